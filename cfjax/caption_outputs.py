"""Captions become lines as they come; a run that was killed goes on where it was.

A line is `{"image": name, "caption": text}`, as `cfjax.prepare_captions` reads them. The JSON beside
the file, `<out>.json`, has the recipe from the start, and the checksum of all captions at the end.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfjax.errors import UserError
from cfjax.sample_places import check_may_replace, check_writable
from cfjax.sample_recipe import begun, difference, read_document, write_document

PROGRAM = "cfjax.caption"


class CaptionsFile:
    """A file of captions that is being written; of several processes, one writes.

    Attributes:
      captions: what is there, in the order of the images.
      is_complete: of all images.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        recipe: Mapping[str, Any],
        names: Sequence[str],
        image_shape: tuple[int, int, int],
        overwrite: bool = False,
    ):
        """Opens a file, new or begun by an earlier run; nothing changes before all is checked.

        Args:
          out: the file.
          recipe: JSON values that fix the captions. Any difference is another run.
          names: of the images.
          image_shape: `(H, W, C)`.
          overwrite: replace another run.

        Raises:
          UserError: another run or something else is there, or it can't be written to.
        """
        self._out = Path(os.path.abspath(Path(out).expanduser()))
        self._json = self._out.with_name(f"{self._out.name}.json")
        self._names = list(names)
        self._asked = begun(recipe, len(names), image_shape)
        if self._out.is_dir():
            raise UserError(f"{self._out} is a folder; name a file of captions as --out.")
        found = read_document(self._json, PROGRAM)
        what = difference(found, self._asked) if found else ""
        if what:
            check_may_replace(self._out, "another run", what, overwrite)
        elif not found and self._out.exists() and not overwrite:
            raise UserError(
                f"{self._out} is not of {PROGRAM}; name another --out or pass --overwrite."
            )
        check_writable(self._out.parent)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        goes_on = found and not what
        lines = self._whole_lines() if goes_on else []
        self.captions = [json.loads(line)["caption"] for line in lines]
        if not self.is_complete:
            if not goes_on:  # the JSON first, so that it never describes what it is not of
                self._json.unlink(missing_ok=True)
                self._out.unlink(missing_ok=True)
            write_document(self._json, self._asked)
            self._cut("".join(lines))

    @property
    def is_complete(self) -> bool:
        return len(self.captions) == len(self._names)

    def append(self, captions: Sequence[str]) -> None:
        """Writes the captions of the next images; when it returns, a kill does not lose them.

        Raises:
          UserError: the disk is full or can't be written to; a later run goes on.
        """
        first = len(self.captions)
        names = self._names[first : first + len(captions)]
        lines = [_line(name, text) for name, text in zip(names, captions, strict=True)]
        try:
            with self._out.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self._out} can't be written: {error.strerror or error}; free space, and run the same"
                " again to go on."
            ) from error
        self.captions += captions

    def finish(self) -> None:
        """Writes into the JSON that the captions are all there.

        Raises:
          UserError: it can't be written.
        """
        digest = hashlib.sha256(self._out.read_bytes()).hexdigest()
        results = self._asked["results"] | {"captions_sha256": digest}
        write_document(self._json, self._asked | {"results": results})

    def _whole_lines(self) -> list[str]:
        """The lines of an earlier run up to the first that is damaged."""
        lines = []
        try:
            content = self._out.read_bytes()
        except FileNotFoundError:
            return lines
        for name, line in zip(self._names, content.split(b"\n")[:-1], strict=False):
            try:
                text = line.decode("utf-8") + "\n"
                if text != _line(name, json.loads(text)["caption"]):
                    break
            except (ValueError, KeyError, TypeError):
                break
            lines.append(text)
        return lines

    def _cut(self, content: str) -> None:
        try:
            with self._out.open("w", encoding="utf-8", newline="\n") as file:
                file.write(content)
        except OSError as error:
            raise UserError(
                f"{self._out} can't be written: {error.strerror or error}; name another --out."
            ) from error


def _line(name: str, caption: str) -> str:
    return json.dumps({"image": name, "caption": caption}, ensure_ascii=False) + "\n"
