"""What a conversion did: every name with its shape, what was left out, checksums, as JSON."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from absl import logging

from cfjax.autoencoder_files import sha256
from cfjax.errors import UserError

REPORT_FILE = "conversion.json"
_MAX_SAID = 5


@dataclasses.dataclass
class Report:
    """Filled while converting.

    Attributes:
      names: one entry for each published array: its name, our path, its published shape.
      left_out: names of the source that have no place in the result, and why.
      remarks: sentences, each of which was logged too.
    """

    names: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def say(self, sentence: str) -> None:
        """Logs a remark and keeps it."""
        logging.info("%s", sentence)
        self.remarks.append(sentence)

    def leave_out(self, names: Mapping[str, str]) -> None:
        """Keeps names with the reason for which each is left out, and says which or how many."""
        self.left_out |= names
        for reason in dict.fromkeys(names.values()):
            left_out = [name for name, other in names.items() if other == reason]
            is_short = len(left_out) <= _MAX_SAID
            listed = ", ".join(left_out) if is_short else f"{len(left_out)} names"
            self.say(f"Left out: {listed}, as {reason}.")

    def map_names(self, shapes: Mapping[str, tuple[int, ...]], ours: Mapping[str, str]) -> None:
        """Keeps names with their shapes; `ours` has our path of each."""
        self.names += [
            {"published": name, "ours": ours[name], "shape": list(shape)}
            for name, shape in shapes.items()
        ]

    def say_casts(self, dtypes: Iterable[str]) -> None:
        """Says of which dtypes, other than float32, arrays became float32."""
        casts = sorted(set(dtypes) - {"float32"})
        if casts:
            self.say(f"Arrays of {', '.join(casts)} became float32.")

    def write(self, path: Path, source: Mapping[str, str], result: Mapping[str, str]) -> None:
        """Writes the report with the checksums of source and result, from `checksum`."""
        document = {"source": source, "result": result, **dataclasses.asdict(self)}
        path.write_text(json.dumps(document, indent=1) + "\n")
        logging.info("%d names were mapped; %s lists them.", len(self.names), path)


def checksum(path: str | PathLike) -> dict[str, str]:
    """Name and sha256 of a file, or of a folder: of its files' paths and sha256 in order."""
    place = Path(path)
    if not place.is_dir():
        return {"name": place.name, "sha256": sha256(place)}
    digest = hashlib.sha256()
    for file in sorted(other for other in place.rglob("*") if other.is_file()):
        if file.name != REPORT_FILE:
            digest.update(f"{sha256(file)}  {file.relative_to(place).as_posix()}\n".encode())
    return {"name": place.name, "sha256": digest.hexdigest()}


def check_names_and_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], mend: str
) -> None:
    """Refuses published weights with missing, extra or misshapen arrays, all of which are listed.

    Raises:
      UserError: there are some; it ends with `mend`.
    """
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"extra {name}" for name in shapes if name not in expected]
    problems += [
        f"{name} is {tuple(shapes[name])} but the model's is {tuple(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    if problems:
        raise UserError(f"the published weights don't fit the model: {'; '.join(problems)}; {mend}")
