"""What samples are compared with: statistics of real images, and features of some of them."""

import dataclasses
import hashlib
import json
import zipfile
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.data.image_files import write_whole
from cfjax.errors import UserError
from cfjax.evaluation.extractors import Extractor, Features
from cfjax.evaluation.statistics import FeatureStatistics

# The number of reference images in the ADM suite's precision and recall.
NUM_KEPT = 10_000
_SEED = 0
_SAVE_EVERY = 10_000  # images
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images in the features of one extractor.

    Attributes:
      name: where they come from, with their number and a checksum.
      pool: statistics of the pool features; `count` is None where a file does not say.
      spatial: of the spatial features, or None.
      features: float32 `[M, F]` pool features of all images or, of more than 10,000, of 10,000 of
        them; for precision, recall and KID; None if there are none.
      image_shape: (H, W, C), or None if it is not known.
    """

    name: str
    pool: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: np.ndarray | None = None
    image_shape: tuple[int, ...] | None = None


class ReferenceBuilder:
    """A reference from the features of its images, as they come; one that was killed goes on.

    Attributes:
      num_done: images whose features are in it; the caller goes on from there.
    """

    def __init__(
        self,
        name: str,
        count: int,
        image_shape: tuple[int, ...],
        state: Path | None = None,
        extractor: str = "",
    ):
        """Begins, or goes on from `state`.

        Args:
          name: see `Reference`.
          count: of the images, at least 2.
          image_shape: (H, W, C).
          state: a file that is kept while it is built; None to keep nothing.
          extractor: describes that of the features; the state of another one is not gone on from.
        """
        if count < 2:
            raise UserError(f"{name} has {count} images; a covariance needs at least 2.")
        self._name, self._count, self._image_shape, self._path = name, count, image_shape, state
        self._extractor = extractor
        self._rows = np.arange(count)
        if count > NUM_KEPT:
            chosen = np.random.default_rng(_SEED).choice(count, NUM_KEPT, replace=False)
            self._rows = np.sort(chosen)
        self._pool = self._spatial = None
        self._kept: list[np.ndarray] = []
        self.num_done = self._num_saved = 0
        if state is not None and state.exists():
            self._restore()

    def add(self, features: Features) -> None:
        """Takes the features of the next images."""
        self._pool = _updated(self._pool, features.pool)
        if features.spatial is not None:
            self._spatial = _updated(self._spatial, features.spatial)
        end = self.num_done + len(features)
        rows = self._rows[(self._rows >= self.num_done) & (self._rows < end)] - self.num_done
        self._kept.append(features.pool[rows])
        self.num_done = end
        if self._path is not None and end - self._num_saved >= _SAVE_EVERY:
            self._save()

    def finish(self) -> Reference:
        """The reference of all images; the state is removed."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        kept = np.concatenate(self._kept)
        return Reference(self._name, self._pool, self._spatial, kept, self._image_shape)

    def _key(self) -> str:
        return json.dumps([self._name, self._count, list(self._image_shape), self._extractor])

    def _save(self) -> None:
        arrays = {"key": self._key(), "kept": np.concatenate(self._kept)}
        for prefix, statistics in (("pool", self._pool), ("spatial", self._spatial)):
            if statistics is not None:
                arrays[f"{prefix}_mean"] = statistics.mean
                arrays[f"{prefix}_scatter"] = statistics.scatter
        write_whole(self._path, lambda file: np.savez(file, count=self.num_done, **arrays))
        self._num_saved = self.num_done

    def _restore(self) -> None:
        try:
            with self._path.open("rb") as file, np.load(file) as arrays:
                if str(arrays["key"]) != self._key():
                    return
                count, kept = int(arrays["count"]), arrays["kept"]
                pool, spatial = (
                    FeatureStatistics(count, arrays[f"{it}_mean"], arrays[f"{it}_scatter"])
                    if f"{it}_mean" in arrays
                    else None
                    for it in ("pool", "spatial")
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return  # damaged: begun again
        self._pool, self._spatial, self._kept = pool, spatial, [kept]
        self.num_done = self._num_saved = count


def _updated(statistics: FeatureStatistics | None, features: np.ndarray) -> FeatureStatistics:
    if statistics is None:
        return FeatureStatistics.of(features)
    return statistics.update(features)


def save(path: str | PathLike, reference: Reference, extractor: Extractor) -> None:
    """Writes a `.npz` that `load` reads, and the ADM suite its `mu`, `sigma`, `mu_s`, `sigma_s`.

    Raises:
      UserError: the file can't be written.
    """
    arrays: dict[str, Any] = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    card = {
        "name": reference.name,
        "count": reference.pool.count,
        "image_shape": reference.image_shape,
        "extractor": extractor.description,
    }
    write_whole(path, lambda file: np.savez(file, card=json.dumps(card), **arrays))


def load(path: str | PathLike, extractor: Extractor) -> Reference | None:
    """Reads statistics: what `save` wrote, or a reference of the ADM suite or of pytorch-fid.

    Files of others don't say which network their statistics are of; they are taken to be of the one
    that the ADM suite, torch-fidelity and pytorch-fid share.

    Args:
      path: a `.npz` with `mu` and `sigma`, of the ADM suite with `mu_s` and `sigma_s` too.
      extractor: of the samples that are to be compared.

    Returns:
      The reference without the features of images that the file may hold in `arr_0`, or None if it
      holds no statistics.

    Raises:
      UserError: it can't be read, or is of other features.
    """
    try:
        with Path(path).open("rb") as file, np.load(file) as arrays:
            names = ("mu", "sigma", "mu_s", "sigma_s", "features", "card")
            found = {name: arrays[name] for name in names if name in arrays}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the reference {path} can't be read as .npz ({error}).") from error
    if "mu" not in found or "sigma" not in found:
        return None
    card = json.loads(str(found["card"])) if "card" in found else {}
    if card and card["extractor"] != extractor.description:
        raise UserError(
            f"the reference {path} is of features of a {card['extractor']}, but the samples' are of a"
            f" {extractor.description}; make it again with cfjax.reference_stats."
        )
    count = card.get("count")
    pool = _statistics(path, found, "mu", "sigma", count, extractor.num_features)
    spatial = None
    if "mu_s" in found and "sigma_s" in found:
        spatial = _statistics(path, found, "mu_s", "sigma_s", count, None)
    described = card.get("name", "statistics of an unknown number of images")
    return Reference(
        f"{Path(path).name}: {described}, sha256 {file_checksum(path)}",
        pool,
        spatial,
        found.get("features"),
        tuple(card["image_shape"]) if card else None,
    )


def is_statistics(path: str | PathLike) -> bool:
    """Whether a `.npz` has statistics and no images."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return {"mu.npy", "sigma.npy"} <= set(names) and "arr_0.npy" not in names


def has_images(path: str | PathLike) -> bool:
    """Whether a `.npz` has images beside its statistics."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def with_images(statistics: Reference, images: Reference) -> Reference:
    """Statistics with the features of images that are beside them, for precision, recall and KID."""
    return dataclasses.replace(
        statistics,
        name=f"{statistics.name}; precision and recall of its {len(images.features)} images",
        features=images.features,
        image_shape=images.image_shape,
    )


def _statistics(path, found, mean, covariance, count, num_features) -> FeatureStatistics:
    size = found[mean].size
    if found[mean].shape != (size,) or found[covariance].shape != (size, size):
        raise UserError(
            f"the reference {path} has {mean} of {list(found[mean].shape)} and {covariance} of"
            f" {list(found[covariance].shape)}, which do not fit each other."
        )
    if num_features is not None and size != num_features:
        raise UserError(
            f"the reference {path} is of {size} features, but the samples have {num_features}; pass"
            " one of the same extractor."
        )
    wide = (found[name].astype(np.float64) for name in (mean, covariance))
    return FeatureStatistics.from_mean_and_covariance(count, *wide)


def file_checksum(path: str | PathLike) -> str:
    """SHA-256 of a file, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:12]
