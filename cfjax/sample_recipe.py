"""The JSON of generated images: the recipe that fixes their bytes, and what came of it.

`{"recipe": {...}, "results": {"num_samples", "image_shape", "images_sha256"}}`; while a run goes on,
`images_sha256`, over the uint8 bytes of all images in order, is yet to come.
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from cfjax.data.image_files import write_whole
from cfjax.errors import UserError

PROGRAM = "cfjax.sample"
FILE_SUFFIXES = (".png", ".npz", ".array_record")
JSON_OF_FOLDER = "generation.json"
_MISSING = object()
_IDENTITY = ("num_samples", "image_shape")


def json_of(out: Path) -> Path:
    """Where the JSON of an output lies: beside a file or a set, within a folder of PNGs."""
    if out.suffix.lower() in FILE_SUFFIXES:
        return out.with_name(f"{out.name}.json")
    return out / JSON_OF_FOLDER


def begun(
    recipe: Mapping[str, Any], num_samples: int, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What the JSON of a run holds from its start; tuples become lists, as in a file.

    Raises:
      TypeError: the recipe has what is no JSON value.
    """
    results = {"num_samples": num_samples, "image_shape": list(image_shape)}
    return json.loads(json.dumps({"recipe": dict(recipe), "results": results}))


def images_per_document(document: Mapping[str, Any]) -> int:
    """How many images follow one another; 1 of images of classes.

    Args:
      document: the JSON of a run.
    """
    return _prompt(document).get("images_per_document", 1)


def label_noun(document: Mapping[str, Any]) -> str:
    """What labels are the numbers of: "class", or "prompt"."""
    return "prompt" if _prompt(document) else "class"


def _prompt(document: Mapping[str, Any]) -> Mapping[str, Any]:
    return document["recipe"].get("request", {}).get("prompt", {})


def is_finished(document: Mapping[str, Any]) -> bool:
    """Whether the images it describes are all there."""
    return "images_sha256" in document["results"]


def read_recipe(path: str | PathLike) -> dict[str, Any]:
    """Reads the JSON of a finished output.

    Args:
      path: of the JSON, or of the output that it describes.

    Returns:
      `{"recipe": as it was given, "results": {"num_samples", "image_shape", "images_sha256"}}`.

    Raises:
      UserError: there is none, or it is not of a finished output.
    """
    path = Path(path).expanduser()
    if path.suffix != ".json" or path.is_dir():
        path = json_of(path)
    document = read_document(path)
    if document is None:
        raise UserError(f"there is no {path}; name the output of a {PROGRAM} that has finished.")
    if not is_finished(document):
        raise UserError(f"{path} is of a {PROGRAM} that has not finished; run the same again.")
    return document


def read_document(path: Path, program: str = PROGRAM) -> dict[str, Any] | None:
    """The JSON of a run, finished or not; None if there is no such file.

    Args:
      path: of the JSON.
      program: which wrote it, for the error.

    Raises:
      UserError: it is something else.
    """
    try:
        document = json.loads(path.read_text())
        if isinstance(document["recipe"], dict) and all(
            it in document["results"] for it in _IDENTITY
        ):
            return document
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not of {program}, or damaged; move it away or name another --out.")


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the JSON, whole or not at all.

    Raises:
      UserError: it can't be written.
    """
    text = json.dumps(document, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first value in which another run differs, as "KEY FOUND, not ASKED"; "" if it is the same."""
    for of_found, of_asked in (
        (_flat(found["recipe"]), _flat(asked["recipe"])),
        *[({key: found["results"][key]}, {key: asked["results"][key]}) for key in _IDENTITY],
    ):
        for key in of_asked | of_found:
            ours, theirs = (_text(values.get(key, _MISSING)) for values in (of_asked, of_found))
            if ours != theirs:
                return f"{key} {_short(theirs)}, not {_short(ours)}"
    return ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings, by dotted names."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    return "missing" if value is _MISSING else json.dumps(value)  # of NaN too, which is not itself


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
