"""Your own pictures: a folder with one sub-folder a class."""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from absl import logging

from cfjax.data.image_files import check_channels, map_with_progress, read_image
from cfjax.data.image_listing import EXTENSIONS, class_folders, files_of_class, fingerprint
from cfjax.data.images import center_crop
from cfjax.data.records import ON_CORRUPT
from cfjax.data.splits import held_out
from cfjax.errors import UserError, check_choice, listed

_MAX_BYTES_IN_MEMORY = 2**30


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
        check_channels(channels)
        root = Path(path).expanduser()
        if not str(path) or not root.is_dir():
            raise UserError(f"there is no image folder {str(path)!r}; set data.path to one.")
        folders = class_folders(root)
        if not folders:
            raise UserError(
                f"the image folder {root} has no sub-folders; put the images of each class into a"
                " sub-folder of its own."
            )
        self.class_names = tuple(folder.name for folder in folders)
        self.image_shape = (size, size, channels)

        listed = [(file, label) for label, f in enumerate(folders) for file in files_of_class(f)]
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
        left_out = sorted(broken.items()) if split == "train" else ()  # they count once
        self.left_out = tuple(
            {"name": file.relative_to(root).as_posix(), "reason": str(reason)}
            for file, reason in left_out
        )
        usable = [(file, label) for file, label in listed if file not in broken]
        for label, folder in enumerate(folders):
            if not any(of == label for _, of in usable):
                raise UserError(
                    f"the class folder {folder} has no usable image ({', '.join(EXTENSIONS)}); add"
                    " some or remove the folder."
                )
        names = [file.relative_to(root).as_posix() for file, _ in usable]
        is_held_out = held_out(names, [label for _, label in usable])
        chosen = [
            pair
            for pair, held in zip(usable, is_held_out, strict=True)
            if held == (split == "held_out")
        ]
        if not chosen:
            raise UserError(
                f"the image folder {root} has too few images for a split {split!r}; add some."
            )
        self._root, self._files = root, [file for file, _ in chosen]
        self.labels = np.array([label for _, label in chosen], np.int32)
        self._images = None if images is None else np.stack([images[file] for file in self._files])

    def __len__(self) -> int:
        return len(self._files)

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            (file.relative_to(self._root).as_posix(), self.class_names[label], file.stat().st_size)
            for file, label in zip(self._files, self.labels, strict=True)
        )

    def examples_at(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        if self._images is not None:
            images = self._images[indices]
        else:
            images = np.stack([self._decode(self._files[index]) for index in indices])
        return {"image": images, "label": self.labels[indices]}

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


def _named(paths: Iterable[Path]) -> str:
    names = [str(path) for path in sorted(paths)]
    noun = "image file" if len(names) == 1 else "image files"
    return f"{len(names)} {noun} ({listed(names)})"
