"""What the TPU compiler says of the implementations of attention, in ratios of one version of it."""

import functools

import pytest

from benchmarks import attention_bytes

pytestmark = pytest.mark.oracle
pytest.importorskip("libtpu", reason="the TPU compiler is not installed")


@functools.cache
def bytes_accessed(case):
    return attention_bytes.measure_in_process(case)["bytes_accessed_mib"]


@pytest.mark.parametrize(
    ("size", "most"),
    [
        pytest.param("256", 0.75, marks=pytest.mark.long),
        pytest.param("512", 0.10, marks=pytest.mark.long),
    ],
)
def test_attention_moves_fewer_bytes_than_with_a_mask_array(size, most):
    """Splash attention, which holds neither mask nor weights in memory."""
    assert bytes_accessed(f"{size}_splash") <= most * bytes_accessed(f"{size}_mask")


@pytest.mark.parametrize("attention", ["fused", pytest.param("split", marks=pytest.mark.long)])
def test_a_mask_from_ids_is_cheaper_than_an_array(attention):
    assert bytes_accessed(f"256_{attention}") < 0.85 * bytes_accessed("256_mask")


@pytest.mark.long
def test_a_train_step_with_splash_attention_moves_fewest_bytes():
    """Why the configs for ImageNet take it."""
    steps = {name: bytes_accessed(f"step_{name}") for name in ("fused", "split", "splash")}
    assert min(steps, key=steps.get) == "splash"
    assert steps["splash"] < 0.9 * steps["fused"]


@pytest.mark.long
def test_a_layer_with_splash_attention_moves_fewer_bytes():
    assert bytes_accessed("block_splash") <= 0.95 * bytes_accessed("block_fused")
