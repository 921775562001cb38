"""The error for bad input: one sentence that names the value and the mend."""

import difflib
from collections.abc import Iterable, Sequence

_MAX_NAMED = 5


class UserError(ValueError):
    """Input that a person can mend; programs print its message alone and exit with code 2."""


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a `value` outside `choices`, naming the nearest choice.

    Raises:
      UserError: `value` is unknown.
    """
    choices = list(choices)
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(f"unknown {what} {value!r}; {hint}Known: {', '.join(choices)}.")


def listed(names: Sequence[str]) -> str:
    """The first five of many names, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}"
