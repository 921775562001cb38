"""Preflight with the real TPU compiler, in processes of their own: minutes, some 2 GiB each."""

import json
import re
import subprocess
import sys

import pytest
import tiny

from cfjax.compiled_report import needed_bytes
from cfjax.tpu_topology import CHIPS

pytestmark = pytest.mark.oracle
GIB = 2**30

# Thirty arrays of 4 GiB are too much for any chip; prints what the compiler says to that.
TOO_MUCH = """
import sys
import jax, jax.numpy as jnp
from cfjax.tpu_topology import describe_devices
jax.config.update("jax_platforms", "cpu")
sharding = jax.sharding.SingleDeviceSharding(describe_devices(sys.argv[1])[0])
arrays = [jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32, sharding=sharding)] * 30
try:
    jax.jit(lambda arrays: [x + 1 for x in arrays]).lower(arrays).compile()
except jax.errors.JaxRuntimeError as error:
    print(error)
"""


def python(*arguments):
    pytest.importorskip("libtpu")
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tiny.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def preflight(config, *arguments):
    """The report of a config that fits."""
    result = python("-m", "cfjax.preflight", f"--config={config}", "--json=-", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def gathers_in_loops(report):
    (program,) = report["programs"]
    rows = [it for it in program["collectives"] if it["kind"] == "all-gather" and it["in_loop"]]
    assert rows
    return rows


@pytest.mark.parametrize(
    ("chip", "topology"),
    [("v4", "v4:1x1x1"), ("v5e", "v5e:1x1"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2")],
)
def test_memory_limits_are_the_compilers(chip, topology):
    """Megacore chips have the memory of both cores; the message is one that preflight reads."""
    result = python("-c", TOO_MUCH, topology)
    assert result.returncode == 0, result.stderr
    stated = re.search(r"(?:of |available HBM \()([0-9.]+)G", result.stdout)
    assert CHIPS[chip].hbm_limit == int(float(stated[1]) * GIB)
    assert needed_bytes(result.stdout) >= 120 * GIB


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v4:3x3x3"], "does not know the topology 'v4:3x3x3'"),
        (
            ["--topology=v5e:2x2", "--config.train.tpu_compiler_options=('xla_tpu_magic=true',)"],
            "does not know the option 'xla_tpu_magic' of train.tpu_compiler_options",
        ),
    ],
)
def test_what_the_compiler_does_not_know_is_refused(arguments, words):
    result = python("-m", "cfjax.preflight", *tiny.flags(), *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


@pytest.mark.long
def test_two_slices():
    config = f"{tiny.CONFIGS / 'mnist.py'}"
    arguments = ["--topology=v5e:2x2", "--slices=2", "--config.mesh.fsdp=2"]
    report = preflight(config, *arguments)
    assert report["num_chips"] == 8
    assert report["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.long
def test_xl_on_a_pod():
    report = preflight("configs/imagenet256.py:xl", "--topology=v5e:16x16")
    (program,) = report["programs"]
    assert report["num_chips"] == 256 and report["num_parameters"] == 713_988_368
    assert program["memory"]["peak"] < 6 * GIB
    assert program["flops"]["ratio"] <= 1.03
    rows = program["collectives"]
    assert not any(it["kind"] == "all-gather" and "f32" in it["dtype"] for it in rows)
    asynchronous, everything = (
        sum(it[key] for it in gathers_in_loops(report)) for key in ("async_bytes", "bytes")
    )
    assert asynchronous >= 0.8 * everything
    # The class table has 164 MB in bfloat16: only rows of it travel.
    assert program["largest_collective"]["bytes"] <= 64e6


@pytest.mark.long
@pytest.mark.parametrize("variant", ["l", "transfusion"])
def test_captions_and_images_on_a_pod(variant):
    report = preflight(
        f"configs/in1kcap256.py:{variant}",
        "--topology=v5e:16x16",
        "--config.autoencoder.path=kl16",  # named for its latents; no file is read
    )
    (program,) = report["programs"]
    assert report["num_chips"] == 256 and report["batch_size"] == 2048
    assert report["row"] == {"text_tokens": 260, "images": 1}
    assert program["num_clean"] == 256
    assert program["memory"]["peak"] < 5 * GIB
    assert 1.0 < program["flops"]["ratio"] <= 1.02
    assert all(it["async_count"] == it["count"] for it in gathers_in_loops(report))
    assert program["largest_collective"]["bytes"] <= 20e6


@pytest.mark.long
def test_captions_sampler_is_refused():
    arguments = ["--topology=v5e:2x2", "--what=sample"]
    result = python("-m", "cfjax.preflight", "--config=configs/in1kcap256.py", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "text.tokenizer makes this a model of documents" in result.stderr


@pytest.mark.long
def test_xl_with_eight_images_a_chip():
    report = preflight(
        "configs/imagenet256.py:xl",
        "--topology=v5e:4x4",
        "--config.mesh.fsdp=4",
        "--config.train.global_batch_size=128",
    )
    (program,) = report["programs"]
    assert program["memory"]["peak"] <= 8 * GIB
    assert program["flops"]["ratio"] <= 1.03


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5p:2x2x2", "v6e:4x2"])
def test_gathers_on_other_chips_are_asynchronous(topology):
    report = preflight(
        "configs/imagenet256.py:xl",
        f"--topology={topology}",
        "--config.mesh.fsdp=4",
        "--config.train.global_batch_size=64",
    )
    assert all(it["async_count"] == it["count"] for it in gathers_in_loops(report))


@pytest.mark.long
@pytest.mark.parametrize("num_ar_steps", [2, 8])
def test_xl_sampler(num_ar_steps):
    """Little memory but the KV cache of 256 images with guidance, in chunks of 128 or 32 tokens."""
    report = preflight(
        "configs/imagenet256.py:xl",
        "--topology=v5e:2x2",
        "--what=sample",
        "--batch_size=256",
        f"--config.sampling.num_ar_steps={num_ar_steps}",
        "--config.sampling.guidance_scale=1.5",
    )
    (program,) = report["programs"]
    memory = program["memory"]
    assert memory["kv_cache"] == 2 * 32 * 128 * 320 * 1280 * 2
    assert memory["peak"] - memory["code"] <= memory["state"] + 1.5 * memory["kv_cache"]
    assert not any(it["in_loop"] for it in program["collectives"])
