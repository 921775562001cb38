"""Paths on disk and in cloud storage, alike."""

from os import PathLike, fspath

from etils import epath

from cfjax.errors import UserError, check_choice

_CLOUD_SCHEMES = ("gs", "s3", "az")


def is_cloud(path: str | PathLike) -> bool:
    """Whether `path` is in cloud storage (`gs://...`), whose files can be replaced but not extended."""
    return "://" in fspath(path)


def absolute(path: str | PathLike) -> epath.Path:
    """An absolute path, `~` expanded.

    Raises:
      UserError: cloud storage that is not known, or whose package is not installed.
    """
    if not is_cloud(path):
        return epath.Path(path).expanduser().resolve()
    check_choice("kind of storage", fspath(path).split("://")[0], _CLOUD_SCHEMES)
    place = epath.Path(path)
    try:
        place.exists()
    except ImportError as error:
        raise UserError(f"the path {place} needs one more package: {error}.") from error
    return place
