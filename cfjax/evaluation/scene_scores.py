"""How many attributes of captioned scenes are right, from captions to images and back.

A caption's mentions and an image's digits are matched by the best assignment: each mention has at
most one digit of its own, and of all such assignments that one counts which has the most
(digit, colour) pairs right, then the most relations and places, then the most digits and colours.
A relation or a place is right if it is true of the matched digits and their pairs are right: two
wrong digits side by side are no "red three left of a blue seven".
"""

import dataclasses
import itertools
from collections.abc import Sequence

from cfjax.data.scene_captions import (
    Description,
    Scene,
    SceneDigit,
    cell_of_place,
    parse_caption,
    relation_between,
)
from cfjax.data.scenes import HELD_OUT_PAIRS
from cfjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SceneScores:
    """Shares of what is right, each over all scenes together; None where there was none to count.

    Attributes:
      num_scenes: how many scenes.
      parsed: captions that the grammar reads.
      digits: mentions whose digit is right.
      colours: mentions whose colour is right.
      pairs: mentions with both right, of one digit.
      held_out_pairs: the same of the mentions of HELD_OUT_PAIRS alone.
      relations: "left of", "right of", "above" or "below", of right pairs.
      places: "in the top left" and the like, of a right pair.
      number: scenes with as many digits as mentions.
      scenes: with everything right.
    """

    num_scenes: int
    parsed: float | None
    digits: float | None
    colours: float | None
    pairs: float | None
    held_out_pairs: float | None
    relations: float | None
    places: float | None
    number: float | None
    scenes: float | None


# What is counted right, in this order, and out of how many.
_COUNTED = tuple(field.name for field in dataclasses.fields(SceneScores)[1:])


def score_images(descriptions: Sequence[Description], readings: Sequence[Scene]) -> SceneScores:
    """Scores images that were generated from captions.

    The shares are of what the captions ask for; a digit too many is an error of `number` alone.

    Args:
      descriptions: what the captions say.
      readings: what a judge saw in the images, in the same order.

    Raises:
      UserError: not as many of the one as of the other.
    """
    _check_lengths("readings", len(readings), "descriptions", len(descriptions))
    rights, outs_of = [], []
    for description, reading in zip(descriptions, readings, strict=True):
        outs_of.append(_asked(description.mentions, description.relations, description.places))
        rights.append(_right(description, reading, outs_of[-1]))
    return _shares(rights, outs_of)


def score_captions(captions: Sequence[str], scenes: Sequence[Scene]) -> SceneScores:
    """Scores captions that were generated from images.

    The shares are of what there is to say of the scenes: every digit, a relation between each and
    the next, or the place of a single one. A caption that says more is scored out of what it says,
    so that what is missing and what is too much both count as wrong; and of one that the grammar
    does not read everything is wrong.

    Args:
      captions: texts.
      scenes: what the images show.

    Raises:
      UserError: not as many of the one as of the other.
    """
    _check_lengths("captions", len(captions), "scenes", len(scenes))
    rights, outs_of = [], []
    for caption, scene in zip(captions, scenes, strict=True):
        pairs = tuple((digit.digit, digit.colour) for digit in scene.digits)
        out_of = _asked(pairs, pairs[1:], pairs if len(pairs) == 1 else ())
        description = parse_caption(caption)
        if description is None:
            rights.append(dict.fromkeys(_COUNTED, 0))
        else:
            said = _asked(description.mentions, description.relations, description.places)
            out_of = {name: max(out_of[name], said[name]) for name in _COUNTED}
            rights.append(_right(description, scene, out_of))
        outs_of.append(out_of)
    return _shares(rights, outs_of)


def _check_lengths(what: str, count: int, other: str, other_count: int) -> None:
    if count != other_count:
        raise UserError(
            f"{count} {what} can't be scored with {other_count} {other}; pass as many of both."
        )


def _asked(mentions: Sequence, relations: Sequence, places: Sequence) -> dict[str, int]:
    """Out of how many each is counted."""
    return {
        "parsed": 1,
        "digits": len(mentions),
        "colours": len(mentions),
        "pairs": len(mentions),
        "held_out_pairs": sum(pair in HELD_OUT_PAIRS for pair in mentions),
        "relations": len(relations),
        "places": len(places),
        "number": 1,
        "scenes": 1,
    }


def _right(description: Description, scene: Scene, out_of: dict[str, int]) -> dict[str, int]:
    """How many are right under the best assignment of mentions to digits."""
    mentions = description.mentions
    num_missing = max(0, len(mentions) - len(scene.digits))
    candidates = [*scene.digits, *[None] * num_missing]
    assignments = itertools.permutations(candidates, len(mentions))
    right = max(
        (_right_if(description, assigned, scene.grid_size) for assigned in assignments),
        key=lambda right: (
            right["pairs"],
            right["relations"] + right["places"],
            right["digits"] + right["colours"],
        ),
    )
    right["parsed"] = 1
    right["number"] = int(len(mentions) == len(scene.digits))
    wanted = ("pairs", "relations", "places", "number")
    right["scenes"] = int(all(right[name] == out_of[name] for name in wanted))
    return right


def _right_if(
    description: Description, assigned: Sequence[SceneDigit | None], grid_size: int
) -> dict[str, int]:
    """How many attributes are right if the mentions are about these digits."""
    mentions = description.mentions
    about = list(zip(mentions, assigned, strict=True))
    is_right = [
        found is not None and (found.digit, found.colour) == mention for mention, found in about
    ]
    return {
        "digits": sum(found is not None and found.digit == digit for (digit, _), found in about),
        "colours": sum(
            found is not None and found.colour == colour for (_, colour), found in about
        ),
        "pairs": sum(is_right),
        "held_out_pairs": sum(
            right and mention in HELD_OUT_PAIRS
            for right, mention in zip(is_right, mentions, strict=True)
        ),
        "relations": sum(
            is_right[a] and is_right[b] and relation_between(assigned[a], assigned[b]) == relation
            for a, relation, b in description.relations
        ),
        "places": sum(
            is_right[index]
            and cell_of_place(place, grid_size) == (assigned[index].row, assigned[index].column)
            for index, place in description.places
        ),
    }


def _shares(rights: list[dict[str, int]], outs_of: list[dict[str, int]]) -> SceneScores:
    shares = {}
    for name in _COUNTED:
        total = sum(out_of[name] for out_of in outs_of)
        shares[name] = sum(right[name] for right in rights) / total if total else None
    return SceneScores(num_scenes=len(rights), **shares)
