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


@pytest.mark.slow
def test_eight_devices_change_no_bit(on_one, weights):
    extractor = InceptionExtractor(weights, sharding.make_mesh(), images_per_device=2)
    assert_same(extractor(IMAGES), on_one[1])


def test_grey_images_are_seen_as_rgb(on_one):
    extractor, _ = on_one
    grey = IMAGES[:2, ..., :1]
    assert_same(extractor(grey), extractor(np.repeat(grey, 3, axis=-1)))
