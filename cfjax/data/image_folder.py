"""Your own pictures: a folder with one sub-folder a class."""

import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image, ImageOps
from tqdm import tqdm

from cfjax.data.images import center_crop
from cfjax.errors import UserError, check_choice

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ON_CORRUPT = ("refuse", "skip")
MODES = {1: "L", 3: "RGB"}
HELD_OUT_SHARE = 0.1
_MAX_NAMED = 5


class ImageFolderSource:
    """The images of `<path>/<class>/**`, centre-cropped; classes in the order of their names.

    A tenth of each class, chosen by a hash of the file's name, is "held_out". See
    `cfjax.data.sources.Source`.
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
        check_choice("data.channels", channels, MODES)
        root = Path(path)
        if not str(path) or not root.is_dir():
            raise UserError(f"there is no image folder {str(path)!r}; set data.path to one.")
        folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not folders:
            raise UserError(
                f"the image folder {root} has no sub-folders; put the images of each class into a"
                " sub-folder of its own."
            )
        self._size, self._mode = size, MODES[channels]
        self.class_names = tuple(folder.name for folder in folders)
        self.image_shape = (size, size, channels)

        listed = [(file, label) for label, f in enumerate(folders) for file in _image_files(f)]
        broken = self._verify(root, [file for file, _ in listed])
        if broken and on_corrupt == "refuse":
            raise UserError(
                f"{_named(broken)} can't be decoded; remove or mend them, or set"
                " data.on_corrupt=skip."
            )
        if broken:
            logging.warning("Skipping what can't be decoded: %s.", _named(broken))
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

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._decode(self._files[index]), "label": self.labels[index]}

    def _decode(self, path: Path) -> np.ndarray:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            pixels = center_crop(upright.convert(self._mode), self._size)
        return pixels.reshape(self.image_shape)

    def _verify(self, root: Path, files: list[Path]) -> set[Path]:
        def is_broken(path: Path) -> bool:
            try:
                self._decode(path)
            except Exception:  # Pillow's decoders raise every kind
                return True
            return False

        with ThreadPoolExecutor() as pool:
            results = tqdm(
                pool.map(is_broken, files),
                total=len(files),
                unit="image",
                desc=f"checking {root}",
                delay=2,
                file=sys.stderr,
            )
            return {file for file, broken in zip(files, results, strict=True) if broken}


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _named(paths: set[Path]) -> str:
    names = [str(path) for path in sorted(paths)]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    noun = "image file" if len(names) == 1 else "image files"
    return f"{len(names)} {noun} ({', '.join(names[:_MAX_NAMED])}{more})"


def _held_out(root: Path, usable: list[tuple[Path, int]]) -> np.ndarray:
    """Which files are held out: of each class the tenth with the smallest hashes, rounded down."""
    hashes = np.array(
        [zlib.crc32(file.relative_to(root).as_posix().encode()) for file, _ in usable]
    )
    labels = np.array([label for _, label in usable])
    held_out = np.zeros(len(usable), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = int(HELD_OUT_SHARE * len(members))
        held_out[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return held_out
