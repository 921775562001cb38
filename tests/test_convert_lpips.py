"""LPIPS's published files to ours; of safetensors, so that no torch is needed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converting import convert

from cfjax import lpips_files
from cfjax.errors import UserError
from cfjax.models import lpips
from cfjax.models.lpips import Lpips
from cfjax.tensor_files import write_tensors

# Of torchvision's VGG-16: the number of each convolution, and its channels.
CONVOLUTIONS = {
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128)},
    **{10: (128, 256), 12: (256, 256), 14: (256, 256), 17: (256, 512)},
    **{19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)},
}


@pytest.fixture(scope="module")
def published():
    """The network and the linear layers, in a file each."""
    rng = np.random.default_rng(0)
    network, linear = {}, {}
    for number, (inputs, outputs) in CONVOLUTIONS.items():
        network[f"features.{number}.weight"] = rng.random((outputs, inputs, 3, 3), np.float32)
        network[f"features.{number}.bias"] = rng.random(outputs, np.float32)
    network["classifier.0.weight"] = np.zeros((2, 2), np.float32)
    for number, channels in enumerate((64, 128, 256, 512, 512)):
        linear[f"lin{number}.model.1.weight"] = rng.random((1, channels, 1, 1), np.float32)
    return network, linear


def write(folder, *files):
    folder.mkdir()
    for number, arrays in enumerate(files):
        shapes = {name: array.shape for name, array in arrays.items()}
        write_tensors(folder / f"{number}.safetensors", shapes, arrays.items())
    return folder


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    return convert(write(folder / "source", *published), folder / "ours", "--from=lpips")


def test_every_array_has_its_place(published, ours):
    network, linear = published
    params = lpips_files.load(ours)
    assert len(params) == 13 + 5
    for number in CONVOLUTIONS:
        layer = params[f"features_{number}"]
        expected = network[f"features.{number}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(layer["kernel"], expected)
        np.testing.assert_array_equal(layer["bias"], network[f"features.{number}.bias"])
    for number in range(5):
        expected = linear[f"lin{number}.model.1.weight"].reshape(-1, 1)
        np.testing.assert_array_equal(params[f"lin_{number}"]["kernel"], expected)


def test_the_report_lists_what_was_mapped_and_left_out(ours):
    report = json.loads((ours / "conversion.json").read_text())
    assert len(report["names"]) == 2 * 13 + 5
    entry = {"published": "lin4.model.1.weight", "shape": [1, 512, 1, 1], "ours": "lin_4/kernel"}
    assert entry in report["names"]
    assert report["left_out"] == {"classifier.0.weight": "they classify"}


def test_weights_that_do_not_fit_are_listed(published, tmp_path):
    network, linear = published
    wrong = linear | {"lin0.model.1.weight": np.zeros((1, 3, 1, 1), np.float32)}
    source = write(tmp_path / "source", network, wrong)
    with pytest.raises(
        UserError, match=r"lin0\.model\.1\.weight is \(1, 3, 1, 1\) but .* vgg\.pth"
    ):
        convert(source, tmp_path / "ours", "--from=lpips")
    (source / "1.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing lin0\.model\.1\.weight; missing lin1"):
        convert(source, tmp_path / "ours", "--from=lpips")
    (source / "0.safetensors").unlink()
    with pytest.raises(UserError, match=r"source is not a folder with weights; put torchvision's"):
        convert(source, tmp_path / "ours", "--from=lpips")
    assert not (tmp_path / "ours").exists()


def test_there_is_no_way_back(ours, tmp_path):
    with pytest.raises(UserError, match="--to=lpips is not possible"):
        convert(ours, tmp_path / "back", "--to=lpips")


def test_damaged_weights_are_refused(ours, tmp_path):
    with pytest.raises(UserError, match="there are no weights of LPIPS in"):
        lpips_files.load(tmp_path)
    write_tensors(tmp_path / "weights.safetensors", {}, [])
    with pytest.raises(UserError, match="are not those of LPIPS; convert them again"):
        lpips_files.load(tmp_path)


@pytest.mark.slow
def test_gradients_are_finite_where_features_are_all_zero():
    """As behind activations that are all off: the root of nothing has no gradient."""
    model = Lpips(stages=((2,), (2,)))
    x, y = jnp.zeros((1, 4, 4, 1)), jnp.ones((1, 4, 4, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, y)["params"]
    params = jax.tree.map(lambda shape: jnp.full(shape.shape, -1.5), shapes)
    distance = jax.jit(lambda x: model.apply({"params": params}, x, y).sum())
    value, gradient = jax.value_and_grad(distance)(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_a_vector_of_length_zero_stays_and_has_a_finite_gradient():
    """By itself, as an activation that is off hides a gradient that is not a number."""
    vectors = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(lpips._unit(vectors), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    of_none, of_five = jax.grad(lambda vectors: lpips._unit(vectors)[:, 0].sum())(vectors)
    assert np.isfinite(of_none).all()
    # Of x / |x|: y² / |x|³ and -x y / |x|³.
    np.testing.assert_allclose(of_five, [16 / 125, -12 / 125], rtol=1e-6)
