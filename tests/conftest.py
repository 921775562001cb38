"""Eight virtual CPU devices, strict ranks, a compilation cache, and oracles that may be required.

With CFJAX_REQUIRE_ORACLES=1 (as `launch/test.sh --all` sets), a test marked `oracle` that skips
fails, and so does a test file that skips as a whole.
"""

import os
from pathlib import Path

# Before jax is imported, and in the environment, for the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two files are tested at a time, and threads of both that wait for each other only burn time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """A process may map so much memory and no more: thousands of compiled programs end in a crash."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A run of the tiny model with random parameters; a test that changes it works on a copy."""
    import tiny  # after the environment is set

    return tiny.save_random_checkpoint(tmp_path_factory.mktemp("random") / "run")


def _fail_if_skipped(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"CFJAX_REQUIRE_ORACLES is set, but this skipped: {report.longrepr}"


def _oracles_are_required():
    return os.environ.get("CFJAX_REQUIRE_ORACLES") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if _oracles_are_required() and item.get_closest_marker("oracle"):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    if _oracles_are_required():
        _fail_if_skipped(report)
    return report
