"""Your own pictures: a folder with one sub-folder a class."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from absl import logging

from cfjax.data.image_files import map_with_progress, read_image
from cfjax.data.images import center_crop
from cfjax.errors import UserError, check_choice

# Other files, and those whose name starts with a dot, are passed over.
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ON_CORRUPT = ("refuse", "skip")
CHANNELS = (1, 3)
HELD_OUT_SHARE = 0.1
_MAX_BYTES_IN_MEMORY = 2**30
_MAX_NAMED = 5  # of broken files in an error


class ImageFolderSource:
    """The images of `<path>/<class>/**`, centre-cropped; classes in the order of their names.

    About a tenth, chosen by a hash of the file's path within the folder, is "held_out", at least
    one image; files that are added move no others. Up to 1 GiB of cropped images stay in memory; of a
    larger set, each is decoded again when it is asked for. See `cfjax.data.sources.Source`.
    """

    def __init__(
        self,
        path: str | PathLike,
        split: str,
        size: int,
        channels: int,
        on_corrupt: str = "refuse",
    ):
        """Lists the files and decodes each once, so that the set is fixed before training.

        Args:
          path: the folder.
          split: "train" or "held_out".
          size: height and width after the crop.
          channels: 1 (grey) or 3 (RGB).
          on_corrupt: "refuse" a broken file, or "skip" it and name it in the log.

        Raises:
          UserError: no folder, class or image is there, or a file is broken and to be refused.
        """
        check_choice("data.on_corrupt", on_corrupt, ON_CORRUPT)
        if channels not in CHANNELS:
            raise UserError(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}.")
        root = Path(path).expanduser()
        if not str(path) or not root.is_dir():
            raise UserError(f"there is no image folder {str(path)!r}; set data.path to one.")
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not folders:
            raise UserError(
                f"the image folder {root} has no sub-folders; put the images of each class into a"
                " sub-folder of its own."
            )
        self.class_names = tuple(folder.name for folder in folders)
        self.image_shape = (size, size, channels)

        listed = [(file, label) for label, f in enumerate(folders) for file in _image_files(f)]
        images, broken = self._verify(root, [file for file, _ in listed])
        if broken and on_corrupt == "refuse":
            raise UserError(
                f"{_named(broken)} can't be decoded; remove or mend them, or set"
                " data.on_corrupt=skip."
            )
        for reason in broken.values():
            logging.warning("skipped: %s", reason)
        if broken:
            logging.warning("skipped %d of %d images in %s", len(broken), len(listed), root)
        usable = [(file, label) for file, label in listed if file not in broken]
        for label, folder in enumerate(folders):
            if not any(of == label for _, of in usable):
                raise UserError(
                    f"the class folder {folder} has no usable image ({', '.join(EXTENSIONS)}); add"
                    " some or remove the folder."
                )
        is_held_out = _held_out(root, usable)
        chosen = [
            pair
            for pair, held in zip(usable, is_held_out, strict=True)
            if held == (split == "held_out")
        ]
        if not chosen:
            raise UserError(
                f"the image folder {root} has too few images for a split {split!r}; add some."
            )
        self._files = [file for file, _ in chosen]
        self.labels = np.array([label for _, label in chosen], np.int32)
        self._images = None if images is None else np.stack([images[file] for file in self._files])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images_at([index])[0], "label": int(self.labels[index])}

    def images_at(self, indices: Sequence[int]) -> np.ndarray:
        if self._images is not None:
            return self._images[indices]
        return np.stack([self._decode(self._files[index]) for index in indices])

    def _decode(self, path: Path) -> np.ndarray:
        size, _, channels = self.image_shape
        return center_crop(read_image(path, channels), size).reshape(self.image_shape)

    def _verify(
        self, root: Path, files: list[Path]
    ) -> tuple[dict[Path, np.ndarray] | None, dict[Path, UserError]]:
        """The images by file, if they fit into memory, and why the others are broken."""
        keep = len(files) * np.prod(self.image_shape) <= _MAX_BYTES_IN_MEMORY

        def verify(path: Path) -> np.ndarray | UserError | None:
            try:
                if keep:
                    return self._decode(path)
                read_image(path, self.image_shape[-1], only_check=True)
            except UserError as error:
                return error
            return None

        results = dict(
            zip(files, map_with_progress(verify, files, f"checking {root}"), strict=True)
        )
        broken = {file: it for file, it in results.items() if isinstance(it, UserError)}
        return (results if keep else None), broken


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _named(paths: Iterable[Path]) -> str:
    names = [str(path) for path in sorted(paths)]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    noun = "image file" if len(names) == 1 else "image files"
    return f"{len(names)} {noun} ({', '.join(names[:_MAX_NAMED])}{more})"


def _held_out(root: Path, usable: list[tuple[Path, int]]) -> np.ndarray:
    """Which files are held out, bool `[N]`: those whose hash lies in the lowest tenth.

    The hash of a file alone decides, not its rank, so that adding files moves no other file. The
    exceptions are for small folders: each class keeps the file of its largest hash for training,
    and if no file is held out, the one of the smallest hash in a class that has others is.
    """
    hashes = np.array([_hash(file.relative_to(root)) for file, _ in usable])
    labels = np.array([label for _, label in usable])
    held_out = hashes < HELD_OUT_SHARE
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out[members[np.argmax(hashes[members])]] = False
    has_others = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not held_out.any() and len(has_others):
        held_out[has_others[np.argmin(hashes[has_others])]] = True
    return held_out


def _hash(path: Path) -> float:
    """Uniform in 0...1. A CRC would not do: it is far from uniform over numbered names."""
    digest = hashlib.sha256(os.fsencode(path.as_posix())).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
