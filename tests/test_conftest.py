"""The hook that lets no oracle test skip when oracles are required."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest


@pytest.mark.oracle
def test_oracle_skips():
    pytest.importorskip("no_such_package")


@pytest.mark.oracle
@pytest.mark.skipif(True, reason="mark")
def test_oracle_skipped_by_mark():
    pass


@pytest.mark.oracle
def test_oracle_passes():
    pass


@pytest.mark.oracle
def test_oracle_fails_as_expected():
    pytest.xfail("known")


def test_other_skips():
    pytest.skip("not an oracle")
"""
SKIPPED_FILE = 'import pytest\n\npytest.importorskip("no_such_package")\n'


@pytest.mark.parametrize(
    ("required", "closing"),
    [
        ("0", "1 passed, 4 skipped, 1 xfailed"),
        ("1", "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors"),
    ],
)
def test_required_oracles_may_not_skip(tmp_path, required, closing):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = oracle\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole_file.py").write_text(SKIPPED_FILE)
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", tmp_path]
    environment = os.environ | {"CFJAX_REQUIRE_ORACLES": required}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert f"{closing} in" in run.stdout.splitlines()[-1], run.stdout
    assert (run.returncode == 0) == (required == "0")
