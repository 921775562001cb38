"""Images in files: any kind read, PNG and NPZ written whole or not at all and read back."""

import contextlib
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cfjax.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg")

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def read_image(
    path: str | PathLike, channels: int | None = None, only_check: bool = False
) -> Image.Image:
    """Reads an image of any kind that Pillow knows; of an animation, the first frame.

    It is turned upright as its EXIF data say; what is transparent lies on white; 16 bits become 8.

    Args:
      path: the file.
      channels: 1 (grey), 3 (RGB), or None for what the file has.
      only_check: decodes all of the file, but may return a JPEG at an eighth of its size, which
        takes a fraction of the time.

    Returns:
      An image of mode "L" or "RGB".

    Raises:
      UserError: the file is missing, broken or no image.
    """
    return _decode(path, path, channels, only_check)


def decode_image(
    content: bytes, name: str, channels: int | None = None, only_check: bool = False
) -> Image.Image:
    """`read_image` of the bytes of a file; `name` is for errors."""
    if not content:
        raise UserError(f"the image {name} has zero bytes; remove or mend it.")
    return _decode(io.BytesIO(content), name, channels, only_check)


def check_channels(channels: int) -> None:
    """Refuses what is neither 1 (grey) nor 3 (RGB).

    Raises:
      UserError: it is another number.
    """
    if channels not in (1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}.")


def _decode(
    file: str | PathLike | BinaryIO, name: str | PathLike, channels: int | None, only_check: bool
) -> Image.Image:
    try:
        with Image.open(file) as image:
            if only_check:
                image.draft(None, (1, 1))
            ImageOps.exif_transpose(image, in_place=True)  # else a copy, turned or not
            image.load()
            return _convert(image, channels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise every kind
        reason = "is no image" if isinstance(error, UnidentifiedImageError) else "can't be decoded"
        raise UserError(f"the image {name} {reason}; remove or mend it.") from error


def _convert(image: Image.Image, channels: int | None) -> Image.Image:
    if channels is None:
        channels = 1 if image.mode.startswith(("1", "L", "I")) else 3
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("more than 16 bits a pixel")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)  # which copies in any case


def map_with_progress(
    function: Callable[[_Item], _Result], items: Sequence[_Item], description: str
) -> Iterator[_Result]:
    """`map` in threads, in order; shows progress on stderr if it takes more than two seconds."""
    with ThreadPool() as pool:
        results = pool.imap(function, items, chunksize=8)
        yield from tqdm(
            results, description, len(items), delay=2, unit="image", leave=False, file=sys.stderr
        )


def write_png(path: str | PathLike, image: np.ndarray) -> None:
    """Writes uint8 `[H, W, 1 or 3]`.

    Raises:
      UserError: the file can't be written.
    """
    write_whole(path, lambda file: _save_png(file, image))


def encode_png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file of uint8 `[H, W, 1 or 3]`."""
    encoded = io.BytesIO()
    _save_png(encoded, image)
    return encoded.getvalue()


def _save_png(file: BinaryIO, image: np.ndarray) -> None:
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(file, format="PNG")


def write_npz(path: str | PathLike, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes images uint8 `[N, H, W, C]` as `arr_0`, as the ADM suite reads them, and `labels`.

    Raises:
      UserError: the file can't be written.
    """
    write_whole(path, lambda file: np.savez(file, arr_0=images, labels=labels))


def write_npz_stream(
    path: str | PathLike,
    batches: Iterable[np.ndarray],
    image_shape: tuple[int, int, int],
    labels: np.ndarray,
) -> None:
    """Writes the bytes that `write_npz` writes, with one batch of images in memory at a time.

    Args:
      path: of the file.
      batches: uint8 `[n, H, W, C]` each, together as many images as there are labels.
      image_shape: `(H, W, C)`.
      labels: int `[N]`.

    Raises:
      UserError: the file can't be written.
      ValueError: there are more or fewer images than labels.
    """
    write_whole(path, lambda file: _stream_npz(file, batches, image_shape, labels))


def _stream_npz(
    file: BinaryIO,
    batches: Iterable[np.ndarray],
    image_shape: tuple[int, int, int],
    labels: np.ndarray,
) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *image_shape)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # Its size is known at the end only, so that ZIP64 is forced, as np.savez does too.
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            count = 0
            for images in batches:
                member.write(images.tobytes())
                count += len(images)
        if count != len(labels):
            raise ValueError(f"{count} images for {len(labels)} labels")
        with archive.open("labels.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels)


def write_whole(path: str | PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file by `write`, whole or not at all: under a hidden name beside it at first.

    Raises:
      UserError: the file can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_images(path: str | PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads samples.

    Args:
      path: a `.npz` with `arr_0` and perhaps `labels`, or a folder of images of one size.

    Returns:
      uint8 `[N, H, W, C]`, and int32 labels `[N]` or None.

    Raises:
      UserError: nothing is there, or it is not images.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path), None
    if not path.is_file():
        raise UserError(f"there are no samples at {path}; pass a .npz or a folder of images.")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            content = {name: arrays[name] for name in ("arr_0", "labels") if name in arrays}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} can't be read as .npz ({error}); write it again.") from error
    images, labels = content.get("arr_0"), content.get("labels")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise UserError(f"{path} must hold uint8 images [N, H, W, C] named 'arr_0'.")
    if labels is not None and labels.shape != images.shape[:1]:
        raise UserError(f"{path} has {len(images)} images but labels of shape {labels.shape}.")
    return images, labels


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder, by name.

    Raises:
      UserError: there is none.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    )
    if not files:
        raise UserError(f"the folder {folder} has no images ({', '.join(EXTENSIONS)}).")
    return files


def _read_folder(folder: Path) -> np.ndarray:
    files = image_paths(folder)
    first = read_pixels(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    pixels_of_all = map_with_progress(read_pixels, files, f"reading {folder}")
    for index, (file, pixels) in enumerate(zip(files, pixels_of_all, strict=True)):
        if pixels.shape != first.shape:
            raise UserError(
                f"the image {file} is {pixels.shape}, but {files[0].name} is {first.shape}; all"
                " must be of one size."
            )
        images[index] = pixels
    return images


def read_pixels(path: str | PathLike) -> np.ndarray:
    """An image, uint8 `[H, W, 1 or 3]`; see `read_image`."""
    pixels = np.asarray(read_image(path))
    return pixels.reshape(*pixels.shape[:2], -1)
