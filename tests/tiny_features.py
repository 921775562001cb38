"""A small stand-in for Inception, for tests of what is made of features: a few means of pixels."""

import numpy as np

from cfjax.evaluation.extractors import Features


class TinyExtractor:
    """Six pool features, four spatial ones, and logits of five classes."""

    name, description, warning = "tiny", "tiny extractor of sha256 123", ""
    num_features = 6
    default_metrics = ("fid", "sfid", "is", "pr")
    is_collective = False

    def __init__(self):
        self.calls = []

    def __call__(self, images, first_index=0):
        self.calls.append((first_index, len(images)))
        flat = images.reshape(len(images), -1).astype(np.float64) / 255
        mixing = np.random.default_rng(0).normal(size=(flat.shape[1], 15)) / 10
        mixed = np.tanh(flat @ mixing).astype(np.float32)
        return Features(mixed[:, :6], mixed[:, 6:10], 5 * mixed[:, 10:])


def images(count, seed=0, size=8, channels=1):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)
