"""The language of the captioned scenes: a small grammar, written and read.

A caption names every digit of its scene as "red three". One digit has its place, two have a
relation, and three form a chain of two relations: "a red three left of a blue seven above a green
one" has the three left of the seven, and the seven above the one.
"""

import dataclasses
import functools
import itertools
import re

MAX_CAPTION_BYTES = 64
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
# Each relation with the phrases for it.
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
}
# Rows of place names for each size of the grid.
PLACES = {
    2: (("top left", "top right"), ("bottom left", "bottom right")),
    3: (
        ("top left", "top centre", "top right"),
        ("centre left", "centre", "centre right"),
        ("bottom left", "bottom centre", "bottom right"),
    ),
}
# {a} {r} {b}: a is in relation r to b; {b} {s} {c} likewise. A name that comes twice is one digit.
TEMPLATES = {
    1: (
        "a {a} in the {place}",
        "{a} in the {place}",
        "{a}, {place}",
        "there is a {a} in the {place}",
        "in the {place} is a {a}",
        "the {place} shows a {a}",
    ),
    2: (
        "a {a} {r} a {b}",
        "{a} {r} {b}",
        "{a}, {r} {b}",
        "there is a {a} {r} a {b}",
        "the {a} is {r} the {b}",
        "{r} the {b} is a {a}",
        "a {b} with a {a} {r} it",
        "a {b} and {r} it a {a}",
    ),
    3: (
        "a {a} {r} a {b} {s} a {c}",
        "{a} {r} {b} {s} {c}",
        "{a} {r} {b}, which is {s} {c}",
        "{a} {r} {b} and {b} {s} {c}",
    ),
}

# Every word that a caption may have.
WORDS = tuple(
    sorted(
        {
            word
            for phrase in itertools.chain(
                (re.sub(r"\{\w+\}", "", template) for it in TEMPLATES.values() for template in it),
                (phrase for phrases in RELATIONS.values() for phrase in phrases),
                (place for rows in PLACES.values() for row in rows for place in row),
                DIGIT_WORDS,
                COLOURS,
            )
            for word in re.findall("[a-z]+", phrase)
        }
    )
)


@dataclasses.dataclass(frozen=True)
class SceneDigit:
    """A digit of a scene.

    Attributes:
      digit: 0 ... 9.
      colour: a name of COLOURS.
      row, column: of its cell, from the top left.
    """

    digit: int
    colour: str
    row: int
    column: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """Digits on a grid, at most one a cell.

    Attributes:
      grid_size: cells along each side, 2 or 3.
      digits: of a set, one to three in the order of the caption's chain, where each shares a row or
        a column with the next; of a judge's reading, any number, row by row.
    """

    grid_size: int
    digits: tuple[SceneDigit, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption says.

    Attributes:
      mentions: the (digit, colour) pairs, in the order of the text.
      relations: (i, relation, j): mention i is in this relation, a name of RELATIONS, to mention j.
      places: (i, place): mention i is there, a name of PLACES.
    """

    mentions: tuple[tuple[int, str], ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    places: tuple[tuple[int, str], ...] = ()


def relation_between(a: SceneDigit, b: SceneDigit) -> str | None:
    """How a stands to b: of the same row left or right of it, of the same column above or below it.

    None for neither, since "left of" would be disputable on the diagonal.
    """
    if a.row == b.row and a.column != b.column:
        return "left of" if a.column < b.column else "right of"
    if a.column == b.column and a.row != b.row:
        return "above" if a.row < b.row else "below"
    return None


def phrasings(scene: Scene) -> list[str]:
    """Every caption of a scene that fits in MAX_CAPTION_BYTES, always in the same order."""
    names = [f"{digit.colour} {DIGIT_WORDS[digit.digit]}" for digit in scene.digits]
    values = dict(zip("abc", names, strict=False))
    templates = TEMPLATES[len(names)]
    if len(names) == 1:
        digit = scene.digits[0]
        place = PLACES[scene.grid_size][digit.row][digit.column]
        return [template.format(**values, place=place) for template in templates]
    relations = [relation_between(a, b) for a, b in itertools.pairwise(scene.digits)]
    captions = []
    for phrases in itertools.product(*(RELATIONS[relation] for relation in relations)):
        values |= zip("rs", phrases, strict=False)
        captions += [template.format(**values) for template in templates]
    return [caption for caption in captions if len(caption) <= MAX_CAPTION_BYTES]


def parse_caption(text: str) -> Description | None:
    """Reads a caption strictly by the grammar: None for any other text."""
    for pattern in _patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            break
    else:
        return None
    groups = match.groupdict()
    order = sorted((name for name in groups if name in "abc"), key=match.start)
    mentions = []
    for name in order:
        colour, word = groups[name].split()
        mentions.append((DIGIT_WORDS.index(word), colour))
    relations = tuple(
        (order.index(first), _relation_of(groups[name]), order.index(second))
        for first, name, second in ("arb", "bsc")
        if name in groups
    )
    places = ((0, groups["place"]),) if "place" in groups else ()
    return Description(tuple(mentions), relations, places)


def cell_of_place(place: str, grid_size: int) -> tuple[int, int] | None:
    """Row and column of a place; None if the grid has none of this name."""
    for row, names in enumerate(PLACES[grid_size]):
        if place in names:
            return row, names.index(place)
    return None


def _relation_of(phrase: str) -> str:
    return next(relation for relation, phrases in RELATIONS.items() if phrase in phrases)


@functools.cache
def _patterns() -> tuple[re.Pattern, ...]:
    name = f"(?:{'|'.join(COLOURS)}) (?:{'|'.join(DIGIT_WORDS)})"
    phrase = "|".join(itertools.chain.from_iterable(RELATIONS.values()))
    place = "|".join({place for rows in PLACES.values() for row in rows for place in row})
    meanings = dict.fromkeys("abc", name) | dict.fromkeys("rs", phrase) | {"place": place}

    def pattern(template: str) -> re.Pattern:
        seen = set()

        def group(field: re.Match) -> str:
            if field[1] in seen:
                return f"(?P={field[1]})"
            seen.add(field[1])
            return f"(?P<{field[1]}>{meanings[field[1]]})"

        return re.compile(re.sub(r"\{(\w+)\}", group, template))

    return tuple(pattern(template) for templates in TEMPLATES.values() for template in templates)
