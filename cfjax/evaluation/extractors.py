"""Images to the features that scores are made of: Inception on a mesh, or a small classifier."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from cfjax import sharding
from cfjax.evaluation.classifier import TrainedClassifier
from cfjax.inception_files import InceptionWeights
from cfjax.models.classifier import NUM_FEATURES
from cfjax.models.inception import NUM_POOL, InceptionV3


@dataclasses.dataclass(frozen=True)
class Features:
    """What scores need of n images; what an extractor does not give is None.

    Attributes:
      pool: float32 `[n, F]`, of the Fréchet distance, precision, recall and KID.
      spatial: float32 `[n, 2023]`, of sFID.
      logits: float32 `[n, 1008]`, of the Inception score.
      classes: int32 `[n]`, those that a classifier of the real images gives.
    """

    pool: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pool)

    def arrays(self) -> dict[str, np.ndarray]:
        """Those that are there, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Of the images of all parts, one after the other."""
        names = parts[0].arrays()
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in names})


class Extractor(Protocol):
    """Images to features.

    Attributes:
      name: stands beside every score that is made of its features.
      description: with the checksum of its weights, for the protocol.
      warning: a sentence that must stand beside every score, or "".
      num_features: F.
      default_metrics: of `scores.METRICS`, those that are made unless others are asked for.
      is_collective: all processes must call it, with the same images; else the first alone.
    """

    name: str
    description: str
    warning: str
    num_features: int
    default_metrics: tuple[str, ...]
    is_collective: bool

    def __call__(self, images: np.ndarray, first_index: int = 0) -> Features:
        """Features of images uint8 `[n, H, W, C]`; `first_index` is the index of the first."""
        ...


class ClassifierExtractor:
    """Features of a small classifier of the real images, which gives classes too."""

    num_features = NUM_FEATURES
    default_metrics = ("fid",)
    warning = ""
    is_collective = False

    def __init__(self, classifier: TrainedClassifier, dataset: str):
        self.name = f"{dataset}-classifier"
        self.description = f"classifier of sha256 {classifier.checksum}"
        self.held_out_accuracy = classifier.held_out_accuracy
        self._classifier = classifier

    def __call__(self, images: np.ndarray, first_index: int = 0) -> Features:
        del first_index  # each image is on its own
        features, classes = self._classifier.features(images)
        return Features(features, classes=classes)


class InceptionExtractor:
    """The ADM suite's Inception, whole on every device of a mesh; the images are split over them.

    A device always takes `images_per_device` images, image i always at the same place among them: as
    sums of another number of rows are rounded otherwise, so features are the same to the bit for any
    batch size and any number of devices.
    """

    num_features = NUM_POOL
    default_metrics = ("fid", "sfid", "is", "pr")
    is_collective = True

    def __init__(
        self, weights: InceptionWeights, mesh: jax.sharding.Mesh, images_per_device: int = 32
    ):
        self.name = "inception" if weights.source_name else "unknown inception"
        self.description = (
            f"Inception of 2015, weights of sha256 {weights.checksum}"
            f" ({weights.source_name or 'of an unknown file'})"
        )
        self.warning = weights.warning or ""
        self._mesh, self._images_per_device = mesh, images_per_device
        replicated = sharding.replicated(mesh)
        self._params = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, replicated, x.__getitem__),
            weights.params,
        )

    def __call__(self, images: np.ndarray, first_index: int = 0) -> Features:
        at_once = self._images_per_device * sharding.num_batch_shards(self._mesh)
        offset = first_index % self._images_per_device
        end = offset + len(images)
        parts = []
        for begin in range(0, end, at_once):
            places = np.clip(np.arange(begin, begin + at_once), offset, end - 1)
            outputs = self._apply(_as_rgb(images[places - offset]))
            real = slice(max(offset - begin, 0), end - begin)
            parts.append(Features(*(array[real] for array in outputs)))
        return Features.joined(parts)

    def _apply(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = sharding.batch_sharding(self._mesh)
        on_mesh = jax.make_array_from_callback(images.shape, rows, images.__getitem__)
        outputs = multihost_utils.process_allgather(_inception(self._params, on_mesh), tiled=True)
        return outputs.pool, outputs.spatial, outputs.logits


@jax.jit
def _inception(params: Any, images: jax.Array) -> Any:
    return InceptionV3().apply({"params": params}, images)


def _as_rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
