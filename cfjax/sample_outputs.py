"""Generated images become files as they come; a run that was killed goes on where it was.

By the suffix of its name an output is a picture of all images (`.png`), an array file as the ADM
suite reads it (`.npz`), a set that training reads (`.array_record`), or a folder of PNGs. A JSON of
the recipe lies beside it, or in the folder: see `cfjax.sample_recipe`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.errors import UserError
from cfjax.paths import is_cloud
from cfjax.sample_places import Place, PngFolder
from cfjax.sample_recipe import FILE_SUFFIXES, begun, json_of, read_document, read_recipe
from cfjax.sample_working_folder import WorkingFolder

__all__ = ["SampleOutput", "open_output", "read_recipe"]

_MAX_IN_GRID = 10_000


class SampleOutput:
    """An output that is being written, from `open_output`; of several processes, one writes.

    Attributes:
      num_done: images that an earlier, killed run of the same recipe left; the caller goes on from
        there.
      is_complete: the finished output of this very recipe is there already.
    """

    def __init__(self, out: Path, asked: dict[str, Any], place: Place):
        self.is_complete = place.is_complete
        self._out, self._asked, self._place = out, asked, place
        self._num_samples = asked["results"]["num_samples"]
        self._image_shape = tuple(asked["results"]["image_shape"])
        self._digest = hashlib.sha256()
        self._labels = np.zeros(self._num_samples, np.int32)
        self._count = 0
        if self.is_complete:
            self._count = self._num_samples
        else:
            for images, labels in place.done():
                self._take(images, labels)
        self.num_done = self._count

    def append(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Writes the next images; when it returns, a kill does not lose them.

        Args:
          images: uint8 `[n, H, W, C]`, in order, the first of them image `num_done` of all.
          labels: int `[n]`, from 0.

        Raises:
          UserError: the disk is full or can't be written to; a later run goes on.
          ValueError: another shape or dtype, or more images than were announced.
        """
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.shape[1:] != self._image_shape or images.ndim != 4:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, not uint8"
                f" [n, {', '.join(map(str, self._image_shape))}]"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images"
            )
        if len(labels) and labels.min() < 0:
            raise ValueError(f"the label {labels.min()} is less than 0")
        if self._count + len(images) > self._num_samples:
            raise ValueError(
                f"{len(images)} images after {self._count} are more than {self._num_samples}"
            )
        if not len(images):
            return
        labels = labels.astype(np.int32)
        with self._writing():
            self._place.write(self._count, images, labels)
        self._take(images, labels)

    def finish(self) -> dict[str, Any]:
        """Makes the output of all images, and writes its JSON last.

        Returns:
          What the JSON holds: `{"recipe", "results": {"num_samples", "image_shape",
          "images_sha256"}}`.

        Raises:
          UserError: the disk is full or can't be written to; a later run goes on.
          ValueError: there are fewer images than were announced.
        """
        if self.is_complete:
            return read_document(json_of(self._out))
        if self._count < self._num_samples:
            raise ValueError(f"{self._count} of {self._num_samples} images were given")
        results = self._asked["results"] | {"images_sha256": self._digest.hexdigest()}
        document = self._asked | {"results": results}
        with self._writing():
            self._place.publish(document, self._labels)
        self.is_complete = True
        return document

    def _take(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._digest.update(np.ascontiguousarray(images))
        self._labels[self._count : self._count + len(labels)] = labels
        self._count += len(labels)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return _one_sentence(self._out, "free space, and run the same again to go on")


def open_output(
    out: str | PathLike,
    recipe: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    num_samples: int,
    overwrite: bool = False,
) -> SampleOutput:
    """Opens an output, new or begun by an earlier run; nothing changes before all is checked.

    Args:
      out: `*.png`, `*.npz`, `*.array_record`, or a folder for PNGs. For the second last, images
        must be square; they have `recipe["num_classes"]` classes, or as many as the labels need.
      recipe: JSON values that fix the bytes of the images. Any difference is another run.
      image_shape: `(H, W, C)`, C of 1 or 3.
      num_samples: how many images there will be.
      overwrite: replace another run; a file when the new one is finished, the PNGs of a folder at
        once. A folder that has anything else is never replaced.

    Raises:
      UserError: another run or something else is there, or the place can't be written to.
      ValueError: an impossible shape or number.
      TypeError: the recipe has what is no JSON value.
    """
    if is_cloud(out):
        raise UserError(
            f"images can't be written to --out={fspath(out)}; write them to a disk and copy them."
        )
    path = Path(os.path.abspath(Path(out).expanduser()))
    kind = path.suffix.lower()
    if len(image_shape) != 3 or image_shape[-1] not in (1, 3) or min(image_shape) < 1:
        raise ValueError(f"images of shape {image_shape} are not [H, W, 1 or 3]")
    if num_samples < 1:
        raise ValueError(f"{num_samples} samples")
    if kind == ".array_record" and image_shape[0] != image_shape[1]:
        raise ValueError(f"images of shape {image_shape} are not square")
    if kind == ".png" and num_samples > _MAX_IN_GRID:
        raise UserError(
            f"a picture of {num_samples} images is too large, as it can have {_MAX_IN_GRID}; let"
            " --out end in .npz."
        )
    asked = begun(recipe, num_samples, image_shape)
    with _one_sentence(path, "name another --out"):
        place = (WorkingFolder if kind in FILE_SUFFIXES else PngFolder)(path, asked)
        place.check(overwrite)
        if place.is_complete:
            place.clean()
        else:
            place.begin()
        return SampleOutput(path, asked, place)


@contextlib.contextmanager
def _one_sentence(out: Path, mend: str) -> Iterator[None]:
    """Says of the output, not of a part in a hidden folder, that it can't be written and the mend."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError | RuntimeError):  # the latter is of array_record
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"{out} can't be written: {reason}; {mend}.") from error
