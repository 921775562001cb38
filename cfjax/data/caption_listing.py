"""Lists images with their captions: of a folder with a `captions.jsonl`.

Each line is `{"image": "relative/path.jpg", "captions": ["...", ...]}` or
`{"image": "relative/path.jpg", "caption": "..."}`; other keys are passed over, as are empty lines.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from cfjax.data.image_listing import ListedImage
from cfjax.data.records import ON_CORRUPT
from cfjax.errors import UserError, check_choice, listed

CAPTIONS_FILE = "captions.jsonl"


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class CaptionedImage:
    """Where an image lies, and its captions, of which there is at least one."""

    image: ListedImage
    captions: tuple[str, ...]


def list_captioned(
    source: str | PathLike, on_corrupt: str = "refuse"
) -> tuple[list[CaptionedImage], list[dict[str, str]]]:
    """The images that a folder's `captions.jsonl` names, in the order of their names.

    An image that several lines name has the captions of all. White space around captions is removed.

    Args:
      source: the folder.
      on_corrupt: "refuse" lines that are bad, or "skip" them.

    Returns:
      The images, and `{"name", "reason"}` of each line that was skipped.

    Raises:
      UserError: there is no such file, no image in it, or lines are bad and to be refused.
    """
    check_choice("on_corrupt", on_corrupt, ON_CORRUPT)
    root = Path(source).expanduser()
    path = root / CAPTIONS_FILE
    if not path.is_file():
        raise UserError(
            f"there is no file {path}; write one with a line"
            ' {"image": "relative/path.jpg", "captions": ["..."]} for each image of the folder.'
        )
    images: dict[str, ListedImage] = {}
    captions: dict[str, list[str]] = {}
    bad = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, texts = _parse(line.removeprefix(b"\xef\xbb\xbf"))
                if name not in images:
                    images[name] = _find(root, name)
                    captions[name] = []
                captions[name] += texts
            except _BadLineError as error:
                bad.append({"name": f"line {number}", "reason": f"line {number}: {error}"})
    if bad and on_corrupt == "refuse":
        noun = "line" if len(bad) == 1 else "lines"
        raise UserError(
            f"{len(bad)} {noun} of {path} can't be used ({listed([it['reason'] for it in bad])});"
            " remove or mend them, or pass --on_corrupt=skip."
        )
    if not images:
        raise UserError(f"{path} names no image that can be used; write a line for each.")
    return [CaptionedImage(images[name], tuple(captions[name])) for name in sorted(images)], bad


def pack_captions(images: Iterable[tuple[str, Iterable[str]]]) -> bytes:
    """The file that keeps `(name, captions)` of the images of a set, a line for each."""
    lines = (
        json.dumps({"image": name, "captions": [*captions]}, ensure_ascii=False)
        for name, captions in images
    )
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def unpack_captions(content: bytes) -> list[tuple[str, list[str]]]:
    """`(name, captions)` of each image, from what `pack_captions` gives."""
    lines = (json.loads(line) for line in content.decode("utf-8").split("\n") if line)
    return [(line["image"], line["captions"]) for line in lines]


class _BadLineError(Exception):
    """What is wrong with a line."""


def _parse(line: bytes) -> tuple[str, list[str]]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLineError("no UTF-8") from error
    except ValueError as error:
        raise _BadLineError("no JSON") from error
    if not isinstance(values, dict):
        raise _BadLineError("no JSON object")
    name = values.get("image")
    if not isinstance(name, str) or not name:
        raise _BadLineError(f"'image' must be a path, not {_short(name)}")
    if ("caption" in values) == ("captions" in values):
        raise _BadLineError("needs either 'caption' or 'captions'")
    texts = [values["caption"]] if "caption" in values else values["captions"]
    if not isinstance(texts, list):
        raise _BadLineError(f"'captions' must be a list, not {_short(texts)}")
    if not texts:
        raise _BadLineError("'captions' is empty")
    for text in (name, *texts):
        if not isinstance(text, str):
            raise _BadLineError(f"a caption must be a text, not {_short(text)}")
        if not text.strip():
            raise _BadLineError("a caption is empty")
        if not _is_unicode(text):
            raise _BadLineError("half of a surrogate pair is no Unicode")
    return os.path.normpath(name), [text.strip() for text in texts]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _find(root: Path, name: str) -> ListedImage:
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)):
        raise _BadLineError(f"the image {name} lies outside the folder")
    try:
        if path.is_file():
            return ListedImage(name, "", str(path), 0, path.stat().st_size)
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise _BadLineError(f"there is no image {_short(name)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
