"""Inception's layers against loops in NumPy, and what its outputs promise; without torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_inception
from golden_data import assert_close_to_max

from cfjax import sharding
from cfjax.errors import UserError
from cfjax.models.inception import NUM_LOGITS, NUM_POOL, NUM_SPATIAL, InceptionV3
from cfjax.models.inception_blocks import average_pool, max_pool, resize

# Other compiled programs, or other places in the batch, sum in another order.
RTOL = 1e-5
BATCH = 8


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def resize_loop(images, size):
    """The rule of TensorFlow 1, a column and then a row at a time, each operation in float32."""
    images = images.astype(np.float32)
    for axis in (2, 1):
        before = images.shape[axis]
        scale, parts = np.float32(before / size), []
        for i in range(size):
            place = np.float32(i) * scale
            low = int(np.floor(place))
            left = images.take(low, axis)
            right = images.take(min(low + 1, before - 1), axis)
            parts.append(left + (right - left) * np.float32(place - np.float32(low)))
        images = np.stack(parts, axis)
    return images


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (256, 256), (299, 299), (320, 320), (1, 400)])
def test_the_resize_is_that_of_tensorflow_1(size):
    """Exactly, an operation at a time; compiled, products and sums may be rounded at once."""
    images = pixels(2, *size, 3)
    expected = resize_loop(images, 299)
    np.testing.assert_array_equal(resize(images), expected)
    np.testing.assert_allclose(jax.jit(resize)(images), expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(resize(images.astype(np.float32)), expected)


def test_images_of_the_networks_size_stay():
    images = pixels(1, 299, 299, 3)
    np.testing.assert_array_equal(resize(images), images)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 2, 1), (1, 8, 8, 2)])
def test_average_pools_leave_padding_out(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32) + 3
    expected = np.zeros_like(x)
    for i in range(shape[1]):
        for j in range(shape[2]):
            around = x[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            expected[:, i, j] = around.mean((1, 2))
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), expected, rtol=1e-6)


def test_max_pools_see_negative_values_at_the_border():
    x = -np.ones((1, 4, 4, 1), np.float32)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), 1, "SAME"), x)


@pytest.fixture(scope="module")
def params():
    return jax.device_put(random_inception.weights().params)


@functools.partial(jax.jit, static_argnames="capture")
def apply(params, images, capture=False):
    """The outputs; with `capture` those of all blocks too."""
    return InceptionV3().apply({"params": params}, images, capture_intermediates=capture)


IMAGES = pixels(BATCH, 20, 28, 3)


@pytest.fixture(scope="module")
def captured(params):
    return apply(params, IMAGES, capture=True)


def test_outputs_have_their_shapes(captured):
    outputs, _ = captured
    shapes = [(BATCH, NUM_POOL), (BATCH, NUM_SPATIAL), (BATCH, NUM_LOGITS)]
    assert [output.shape for output in outputs] == shapes
    assert (NUM_POOL, NUM_SPATIAL, NUM_LOGITS) == (2048, 17 * 17 * 7, 1008)
    for output in outputs:
        assert output.dtype == jnp.float32
        assert 0.1 < np.std(output) < 100


def test_outputs_are_those_of_their_layers(captured, params):
    outputs, state = captured
    blocks = {
        name: value["__call__"][0]
        for name, value in state["intermediates"].items()
        if name.startswith("Mixed")
    }
    assert_close_to_max(outputs.pool, np.mean(blocks["Mixed_7c"], (1, 2)), RTOL)
    spatial = np.asarray(outputs.spatial).reshape(BATCH, 17, 17, 7)  # height, width, channel
    np.testing.assert_array_equal(spatial, blocks["Mixed_6d"][..., :7])
    logits = np.asarray(outputs.pool) @ np.asarray(params["logits"]["kernel"])
    assert_close_to_max(outputs.logits, logits, RTOL)


def test_images_of_a_batch_dont_meet(captured, params):
    others = IMAGES // 2
    others[-1] = IMAGES[0]
    mixed, _ = apply(params, others, capture=True)
    for output, other in zip(captured[0], mixed, strict=True):
        assert_close_to_max(other[-1], output[0], RTOL)
        assert np.abs(other[0] - output[0]).max() > 0.01


def test_eight_devices_give_what_one_gives(captured, params):
    mesh = sharding.make_mesh()
    assert mesh.size == BATCH
    images = jax.device_put(IMAGES, sharding.batch_sharding(mesh))
    outputs = apply(jax.device_put(params, sharding.replicated(mesh)), images)
    for name, output, expected in zip(outputs._fields, outputs, captured[0], strict=True):
        assert len(output.sharding.device_set) == 8 and not output.is_fully_replicated, name
        assert_close_to_max(output, expected, RTOL)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((2, 28, 28, 1), np.uint8), r"not \(2, 28, 28, 1\); repeat grey images to 3"),
        (np.zeros((28, 28, 3), np.uint8), r"\[batch, height, width, 3\], not \(28, 28, 3\)"),
        (np.zeros((2, 28, 28, 3), np.int32), "uint8 or float32 in 0..255, not int32; cast them"),
    ],
)
def test_other_images_are_refused(images, reason):
    with pytest.raises(UserError, match=reason):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), images)


def test_float_images_are_taken():
    images = jnp.zeros((2, 28, 28, 3))
    outputs, _ = jax.eval_shape(InceptionV3().init_with_output, jax.random.key(0), images)
    assert outputs.pool.shape == (2, NUM_POOL)
