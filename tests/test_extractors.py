"""Inception as an extractor: padding never enters, and devices and batches change no bit."""

import dataclasses

import jax
import numpy as np
import pytest
import random_inception
import tiny_features

from cfjax import sharding
from cfjax.evaluation.extractors import Features, InceptionExtractor

IMAGES = tiny_features.images(11, size=32, channels=3)


@pytest.fixture(scope="module")
def weights():
    return random_inception.weights()


@pytest.fixture(scope="module")
def on_one(weights):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    extractor = InceptionExtractor(weights, mesh, images_per_device=2)
    return extractor, extractor(IMAGES)


def assert_same(features, expected):
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(features.arrays()[name], array, err_msg=name)


def test_shapes_and_names(on_one, weights):
    extractor, features = on_one
    assert {name: it.shape for name, it in features.arrays().items()} == {
        "pool": (11, 2048),
        "spatial": (11, 2023),
        "logits": (11, 1008),
    }
    assert extractor.name == "unknown inception"
    assert weights.checksum in extractor.description
    assert "compare with nothing published" in extractor.warning
    known = dataclasses.replace(weights, source_name="a.pth")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert (InceptionExtractor(known, mesh).name, InceptionExtractor(known, mesh).warning) == (
        "inception",
        "",
    )


@pytest.mark.parametrize("first", [3, 8])
def test_the_batch_changes_no_bit(on_one, first):
    """Image i is always at the same place, whatever is asked for at once."""
    extractor, whole = on_one
    rest = extractor(IMAGES[first:], first)
    assert len(rest) == 11 - first
    assert_same(rest, Features(**{n: it[first:] for n, it in whole.arrays().items()}))


@pytest.mark.parametrize(("first", "count"), [(0, 5), (3, 5), (5, 1), (2, 6)])
def test_an_image_has_its_place_among_those_of_a_device(weights, monkeypatch, first, count):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    extractor = InceptionExtractor(weights, mesh, images_per_device=4)
    taken = []

    def record(batch):
        taken.append(batch[:, 0, 0, 0])
        return (batch[:, 0, 0].astype(np.float32), *([batch[:, 0, 0]] * 2))

    monkeypatch.setattr(extractor, "_apply", record)
    images = np.zeros((count, 2, 2, 3), np.uint8)
    images[..., 0] = first + np.arange(count)[:, None, None]
    features = extractor(images, first)
    np.testing.assert_array_equal(features.pool[:, 0], first + np.arange(count))
    for batch in taken:
        assert len(batch) == 4
        own = {int(index): place for place, index in enumerate(batch)}
        real = [index for index in own if list(batch).count(index) == 1]
        assert all(own[index] == index % 4 for index in real)


@pytest.mark.slow
def test_eight_devices_change_no_bit(on_one, weights):
    extractor = InceptionExtractor(weights, sharding.make_mesh(), images_per_device=2)
    assert_same(extractor(IMAGES), on_one[1])


def test_grey_images_are_seen_as_rgb(on_one):
    extractor, _ = on_one
    grey = IMAGES[:2, ..., :1]
    assert_same(extractor(grey), extractor(np.repeat(grey, 3, axis=-1)))
