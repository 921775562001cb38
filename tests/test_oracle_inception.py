"""Inception against torch-fidelity's, through our converter, with random weights and statistics."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchvision_stub
from converting import convert
from golden_data import assert_close_to_max
from test_benchmarks import run

from cfjax import inception_files
from cfjax.models.inception import NUM_LOGITS, NUM_POOL, NUM_SPATIAL, InceptionV3
from cfjax.models.inception_blocks import resize

torch = pytest.importorskip("torch")
with torchvision_stub.installed():
    extractors = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    interpolation = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")

pytestmark = pytest.mark.oracle

# float32 in both, up to 40 convolutions deep.
RTOL = 1e-4
SIZES = [(64, 64), (256, 256), (299, 299), (48, 80)]


@pytest.fixture(scope="module")
def published():
    """Their network, whose every tensor is random and keeps activations near one."""
    network = extractors.FeatureExtractorInceptionV3
    with mock.patch.object(network, "load_state_dict"), mock.patch("torch.load"):
        extractor = network(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path="none"
        )
    generator = torch.Generator().manual_seed(0)
    for name, tensor in extractor.state_dict().items():
        if name.endswith("conv.weight") or name == "fc.weight":
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.6, 1.4, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
    return extractor


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    torch.save(published.state_dict(), folder / "pt_inception.pth")
    return convert(
        folder / "pt_inception.pth", folder / "inception.safetensors", "--from=inception"
    )


@pytest.fixture(scope="module")
def params(ours):
    return jax.device_put(inception_files.load(ours).params)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images))


def images(size):
    return np.random.default_rng(size[0]).integers(0, 256, (2, *size, 3), np.uint8)


def their_outputs(extractor, pixels):
    """`(pool, spatial, logits)` of NHWC images."""
    seen = []
    handle = extractor.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        pool, logits = extractor(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()))
    handle.remove()
    spatial = np.moveaxis(seen[0].numpy(), 1, -1)[..., :7].reshape(len(pixels), -1)
    return pool.numpy(), spatial, logits.numpy()


@pytest.mark.parametrize("size", SIZES)
def test_all_outputs_are_theirs(published, params, apply, size):
    pixels = images(size)
    outputs = apply(params, pixels)
    for name, theirs in zip(outputs._fields, their_outputs(published, pixels), strict=True):
        assert 0.1 < theirs.std() < 100, f"{name} says little"
        assert_close_to_max(getattr(outputs, name), theirs, RTOL)


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_is_theirs(size):
    """Bit by bit, an operation at a time."""
    pixels = images(size)
    tensor = torch.from_numpy(np.moveaxis(pixels, -1, 1).astype(np.float32))
    theirs = interpolation.interpolate_bilinear_2d_like_tensorflow1x(
        tensor, (299, 299), align_corners=False
    )
    np.testing.assert_array_equal(resize(pixels), np.moveaxis(theirs.numpy(), 1, -1))


@pytest.mark.long
def test_the_benchmark_prints_json():
    values = run("evaluation", "--batch_size=1", "--size=32")
    assert values["images_per_second"] > 0 and values["torch_fidelity_images_per_second"] > 0
    assert values["ratio_min"] <= values["ratio"] <= values["ratio_max"]
    assert values["ratio_of_fastest"] == pytest.approx(values["ratio"])  # of the one round


@pytest.mark.long
def test_every_array_moves_the_outputs(params):
    """Each of the 471: with the converter's mapping, none is forgotten or takes another's place."""
    pixels = images((48, 80))[:1]
    sizes = (1, NUM_POOL), (1, NUM_SPATIAL), (1, NUM_LOGITS)
    projections = [np.random.default_rng(0).standard_normal(size, np.float32) for size in sizes]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.grad
    def gradient(params):
        outputs = InceptionV3().apply({"params": params}, pixels)
        return sum(map(jnp.vdot, projections, outputs))

    leaves = jax.tree_util.tree_leaves_with_path(gradient(params))
    assert len(leaves) == 5 * 94 + 1
    for path, leaf in leaves:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4, jax.tree_util.keystr(path)
