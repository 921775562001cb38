"""Images in files: PNG and NPZ written whole or not at all, and read back."""

import io
import os
import zipfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from cfjax.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg")


def write_png(path: str | PathLike, image: np.ndarray) -> None:
    """Writes uint8 `[H, W, 1 or 3]`."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    _write_whole(Path(path), lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def write_npz(path: str | PathLike, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes images uint8 `[N, H, W, C]` as `arr_0`, as the ADM suite reads them, and `labels`."""
    _write_whole(Path(path), lambda file: np.savez(file, arr_0=images, labels=labels))


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_images(path: str | PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads samples.

    Args:
      path: a `.npz` with `arr_0` and perhaps `labels`, or a folder of images of one size.

    Returns:
      uint8 `[N, H, W, C]`, and int32 labels `[N]` or None.

    Raises:
      UserError: nothing is there, or it is not images.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path), None
    if not path.is_file():
        raise UserError(f"there are no samples at {path}; pass a .npz or a folder of images.")
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            content = {name: arrays[name] for name in ("arr_0", "labels") if name in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} can't be read as .npz ({error}); write it again.") from error
    images, labels = content.get("arr_0"), content.get("labels")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise UserError(f"{path} must hold uint8 images [N, H, W, C] named 'arr_0'.")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(f"{path} has {len(images)} images but labels of shape {labels.shape}.")
    return images, labels


def _read_folder(folder: Path) -> np.ndarray:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise UserError(f"the folder {folder} has no images ({', '.join(EXTENSIONS)}).")
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("L", "1", "I;16")
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
        except Exception as error:  # Pillow's decoders raise every kind
            raise UserError(f"the image {file} can't be decoded; remove or mend it.") from error
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if images and pixels.shape != images[0].shape:
            raise UserError(
                f"the image {file} is {pixels.shape}, but {files[0].name} is {images[0].shape}; all"
                " must be of one size."
            )
        images.append(pixels)
    return np.stack(images)
