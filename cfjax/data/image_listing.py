"""Lists images by class: of folders, and of tar files, whose members are read in place."""

import dataclasses
import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path, PurePosixPath

from cfjax.errors import UserError

# Other files, and those whose name starts with a dot, are passed over.
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class ListedImage:
    """Where the bytes of an image lie.

    Attributes:
      name: its path within the source, for messages and the order.
      class_name: its class.
      path: the file, or the tar file that it is in.
      offset: of its bytes in that.
      num_bytes: their number.
    """

    name: str
    class_name: str
    path: str
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        """Its bytes.

        Raises:
          UserError: they can't be read.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.num_bytes)
        except OSError as error:
            raise UserError(
                f"the image {self.name} can't be read: {error.strerror}; remove or mend it."
            ) from error
        if len(content) < self.num_bytes:
            raise UserError(
                f"the image {self.name} ends after {len(content)} of {self.num_bytes} bytes;"
                " remove or mend it."
            )
        return content


def list_images(source: str | PathLike) -> list[ListedImage]:
    """The images of a source, in the order of their classes and names.

    Args:
      source: a folder with one sub-folder a class; or a tar file, where the class is the folder in
        which a member lies, or else the name of the tar file; or a folder of such tar files.

    Raises:
      UserError: there are no images or no classes, or a tar file is compressed or damaged.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        images = [*_in_folders(root)]
        for path in sorted(root.glob("*.tar")):
            images += _in_tar(path)
    elif root.is_file():
        images = [*_in_tar(root)]
    else:
        raise UserError(f"there is no folder and no tar file {str(source)!r}; name one.")
    if not images:
        raise UserError(
            f"{root} has no images ({', '.join(EXTENSIONS)}) in sub-folders or tar files; put those"
            " of each class into a sub-folder of its own."
        )
    return sorted(images, key=lambda image: (image.class_name, image.name))


def files_of_class(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders, sorted."""
    return sorted(path for path in folder.rglob("*") if _is_image(path.relative_to(folder), path))


def class_folders(root: Path) -> list[Path]:
    """The sub-folders, each a class, sorted."""
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def fingerprint(images: Iterable[tuple[str, str, int]]) -> str:
    """A hash of images' names, classes and numbers of bytes, but not of where they lie."""
    digest = hashlib.sha256()
    for name, class_name, num_bytes in images:
        digest.update(os.fsencode(f"{name}\0{class_name}\0{num_bytes}\n"))
    return digest.hexdigest()


def _is_image(name: PurePosixPath | Path, path: Path | None = None) -> bool:
    return (
        name.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in name.parts)
        and (path is None or path.is_file())
    )


def _in_folders(root: Path) -> Iterator[ListedImage]:
    for folder in class_folders(root):
        for path in files_of_class(folder):
            name = path.relative_to(root).as_posix()
            yield ListedImage(name, folder.name, str(path), 0, os.path.getsize(path))


def _in_tar(path: Path) -> Iterator[ListedImage]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isreg() and _is_image(name):
                    yield ListedImage(
                        f"{path.name}/{name}",
                        name.parent.name or path.stem,
                        str(path),
                        member.offset_data,
                        member.size,
                    )
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} can't be read as a tar file that is not compressed ({error}); decompress or"
            " replace it."
        ) from error
