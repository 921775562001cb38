"""Images to score, read batch by batch: an ADM `.npz`, or a folder of images."""

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from os import PathLike
from pathlib import Path

import numpy as np

from cfjax.data.image_files import image_paths, read_pixels
from cfjax.data.sources import Source
from cfjax.errors import UserError

_MEMBER = "arr_0.npy"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size, in order.

    Attributes:
      name: where they come from.
      count: N.
      image_shape: (H, W, C).
      labels: int32 `[N]`, or None.
      read: yields batches uint8 `[n, H, W, C]` from image `first`, of `batch_size` but for the last.
    """

    name: str
    count: int
    image_shape: tuple[int, int, int]
    labels: np.ndarray | None
    read: Callable[[int, int], Iterator[np.ndarray]]


def of_source(source: Source, name: str) -> ImageSet:
    """The images of a dataset; labels are read with them only."""

    def read(first: int, batch_size: int) -> Iterator[np.ndarray]:
        for begin in range(first, len(source), batch_size):
            indices = np.arange(begin, min(begin + batch_size, len(source)))
            yield source.examples_at(indices)["image"]

    return ImageSet(name, len(source), source.image_shape, None, read)


def open_images(path: str | PathLike) -> ImageSet:
    """Opens samples; pixels are read when they are asked for.

    Args:
      path: a `.npz` with `arr_0` and perhaps `labels`, or a folder of images of one size.

    Raises:
      UserError: nothing is there, it is not images, or they are laid out otherwise.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise UserError(f"there are no samples at {path}; pass a .npz or a folder of images.")
    return of_npz(path)


def of_npz(path: Path) -> ImageSet:
    """The images of a `.npz` as the ADM suite has them; see `open_images`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _MEMBER not in names:
                raise UserError(f"{path} has no array 'arr_0'; it must hold uint8 [N, H, W, C].")
            with archive.open(_MEMBER) as member:
                shape, is_fortran, dtype = _read_header(member)
        labels = None
        if "labels.npy" in names:
            with path.open("rb") as file, np.load(file) as arrays:
                labels = arrays["labels"]
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} can't be read as .npz ({error}); write it again.") from error
    _check_layout(path, shape, dtype)
    if is_fortran:
        raise UserError(f"{path} has images in Fortran order; write np.ascontiguousarray of them.")
    if labels is not None and labels.shape != shape[:1]:
        raise UserError(f"{path} has {shape[0]} images but labels of shape {labels.shape}.")

    def read(first: int, batch_size: int) -> Iterator[np.ndarray]:
        num_bytes = int(np.prod(shape[1:]))
        try:
            with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as member:
                _read_header(member)
                member.seek(first * num_bytes, 1)
                for begin in range(first, shape[0], batch_size):
                    size = min(batch_size, shape[0] - begin)
                    content = member.read(size * num_bytes)
                    if len(content) < size * num_bytes:
                        raise EOFError(f"it ends within image {begin + len(content) // num_bytes}")
                    yield np.frombuffer(content, np.uint8).reshape(size, *shape[1:])
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} can't be read as .npz ({error}); write it again.") from error

    return ImageSet(str(path), shape[0], tuple(shape[1:]), labels, read)


def _read_header(member):
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"an array of format {version}")
    return read[version](member)


def _check_layout(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    found = f"{path} has 'arr_0' of {dtype} {list(shape)}, but it must be uint8 [N, H, W, C]"
    if dtype != np.uint8:
        mend = "multiply images in [-1, 1] by 127.5, add 127.5 and cast them"
        raise UserError(f"{found}: {mend if dtype.kind == 'f' else 'cast it'}.")
    if len(shape) != 4 or not np.prod(shape):
        raise UserError(f"{found}.")
    if shape[3] not in (1, 3):
        mend = "; it looks like [N, C, H, W]: transpose it by (0, 2, 3, 1)"
        raise UserError(f"{found}{mend if shape[1] in (1, 3) else ' with 1 or 3 channels'}.")


def _of_folder(path: Path) -> ImageSet:
    files = image_paths(path)
    first_shape = read_pixels(files[0]).shape

    def read_checked(file: Path) -> np.ndarray:
        pixels = read_pixels(file)
        if pixels.shape != first_shape:
            raise UserError(
                f"the image {file} is {pixels.shape}, but {files[0].name} is {first_shape}; all must"
                " be of one size."
            )
        return pixels

    def read(first: int, batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPool() as pool:
            for begin in range(first, len(files), batch_size):
                yield np.stack(pool.map(read_checked, files[begin : begin + batch_size]))

    return ImageSet(str(path), len(files), first_shape, None, read)
