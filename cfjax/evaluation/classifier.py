"""Features from a classifier trained on the real images, kept in a folder beside the run."""

import dataclasses
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import optax
from absl import logging
from tqdm import tqdm

from cfjax.data.images import to_model_range
from cfjax.data.sources import Source, all_images
from cfjax.models.classifier import CHANNELS, NUM_FEATURES, Classifier

_PARAMS, _CARD = "params.npz", "classifier.json"
_BATCH = 250


@dataclasses.dataclass(frozen=True)
class ClassifierTraining:
    """How the classifier is trained; `fit` reads every field.

    Attributes:
      epochs: over the training images.
      batch_size: images at a time.
      learning_rate: Adam's at the start, falling to 0 as a cosine.
      max_shift: each image is shifted by up to this many pixels along both axes.
      seed: of initialization, order and shifts.
    """

    epochs: int = 12
    batch_size: int = 100
    learning_rate: float = 2e-3
    max_shift: int = 2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """A classifier ready to score.

    Attributes:
      params: its parameters, by flat name.
      num_classes: K.
      held_out_accuracy: share of the held-out real images that it classifies correctly.
      checksum: SHA-256 of the parameters, 12 hexadecimal digits.
    """

    params: dict[str, np.ndarray]
    num_classes: int
    held_out_accuracy: float
    checksum: str

    def features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 `[N, H, W, C]` to features float32 `[N, 64]` and classes int32 `[N]`."""
        params = flax.traverse_util.unflatten_dict(self.params, sep="/")
        features, classes = [np.empty((0, NUM_FEATURES), np.float32)], [np.empty(0, np.int32)]
        for begin in range(0, len(images), _BATCH):
            batch = to_model_range(images[begin : begin + _BATCH])
            padded = np.pad(batch, [(0, _BATCH - len(batch)), (0, 0), (0, 0), (0, 0)])
            outputs = jax.device_get(_apply(Classifier(self.num_classes), params, padded))
            features.append(outputs[0][: len(batch)])
            classes.append(outputs[1][: len(batch)].argmax(-1).astype(np.int32))
        return np.concatenate(features), np.concatenate(classes)


def _apply(model: Classifier, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.apply({"params": params}, images)


_apply = jax.jit(_apply, static_argnums=0)


def load_or_train(
    folder: str | os.PathLike,
    train: Source,
    held_out: Source,
    training: ClassifierTraining | None = None,
) -> TrainedClassifier:
    """The classifier of a folder, trained first if there is none for these images and settings.

    Args:
      folder: where it is kept; made if missing.
      train, held_out: the real images.
      training: how to train.
    """
    training = training or ClassifierTraining()
    folder = Path(folder)
    images, labels = all_images(train)
    held_out_images, held_out_labels = all_images(held_out)
    key = {
        "images": _digest(images, labels),
        "held_out_images": _digest(held_out_images, held_out_labels),  # of which the accuracy is
        "training": dataclasses.asdict(training),
        "num_classes": len(train.class_names),
        "model": [list(CHANNELS), NUM_FEATURES, *train.image_shape],
    }
    kept = _load(folder, key)
    if kept is not None:
        return kept
    params = fit(images, labels, len(train.class_names), training)
    flat = flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")
    classifier = TrainedClassifier(flat, len(train.class_names), 0.0, _checksum(flat))
    _, classes = classifier.features(held_out_images)
    accuracy = float(np.mean(classes == held_out_labels))
    classifier = dataclasses.replace(classifier, held_out_accuracy=accuracy)
    _save(folder, key, classifier)
    logging.info("Trained the classifier in %s: %.1f%% held out.", folder, 100 * accuracy)
    return classifier


def fit(
    images: np.ndarray, labels: np.ndarray, num_classes: int, training: ClassifierTraining
) -> Any:
    """Parameters after training on uint8 images `[N, H, W, C]` and labels `[N]`; deterministic."""
    model = Classifier(num_classes)
    batch_size = min(training.batch_size, len(images))
    num_batches = len(images) // batch_size
    schedule = optax.cosine_decay_schedule(training.learning_rate, training.epochs * num_batches)
    optimizer = optax.adam(schedule)
    params = model.init(jax.random.key(training.seed), to_model_range(images[:1]))["params"]
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, images, labels):
        def loss_fn(params):
            _, logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(training.seed)
    for _ in tqdm(range(training.epochs), desc="classifier", unit="epoch", file=sys.stderr):
        order = rng.permutation(len(images))
        for begin in range(0, num_batches * batch_size, batch_size):
            rows = order[begin : begin + batch_size]
            batch = _shifted(images[rows], training.max_shift, rng)
            params, opt_state = update(params, opt_state, to_model_range(batch), labels[rows])
    return params


def _shifted(images: np.ndarray, max_shift: int, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by up to `max_shift` pixels; the edge is repeated."""
    padding = [(0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0)]
    padded = np.pad(images, padding, mode="edge")
    height, width = images.shape[1:3]
    offsets = rng.integers(0, 2 * max_shift + 1, (len(images), 2))
    return np.stack(
        [
            image[top : top + height, left : left + width]
            for image, (top, left) in zip(padded, offsets, strict=True)
        ]
    )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def _checksum(params: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode() + np.ascontiguousarray(params[name]).tobytes())
    return digest.hexdigest()[:12]


def _save(folder: Path, key: dict[str, Any], classifier: TrainedClassifier) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = io.BytesIO()
    np.savez(arrays, **classifier.params)
    card = key | {
        "held_out_accuracy": classifier.held_out_accuracy,
        "checksum": classifier.checksum,
    }
    # The card comes last: without it, or with another checksum, the classifier is trained anew.
    for name, content in ((_PARAMS, arrays.getvalue()), (_CARD, json.dumps(card).encode())):
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def _load(folder: Path, key: dict[str, Any]) -> TrainedClassifier | None:
    if not (folder / _CARD).exists():
        return None
    try:
        card = json.loads((folder / _CARD).read_text())
        with np.load(io.BytesIO((folder / _PARAMS).read_bytes())) as arrays:
            params = {name: arrays[name] for name in arrays}
        if {name: card[name] for name in key} != key:
            logging.info("The classifier in %s is of other images or settings.", folder)
            return None
        if _checksum(params) != card["checksum"]:
            raise ValueError("another checksum")
        return TrainedClassifier(
            params, card["num_classes"], card["held_out_accuracy"], card["checksum"]
        )
    except Exception as error:  # a damaged archive raises every kind
        logging.warning("The classifier in %s is damaged (%s) and trained anew.", folder, error)
        return None
