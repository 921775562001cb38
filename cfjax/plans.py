"""Plans for generation: how many tokens, and how many denoising steps, each AR step takes."""

import math
from collections.abc import Sequence

from cfjax.errors import UserError, check_choice
from cfjax.factorization import check_split_sizes, equal_split_sizes

SPLITS = ("equal", "cosine")


def split_sizes(
    split: str, num_tokens: int, num_ar_steps: int, explicit: Sequence[int] = ()
) -> tuple[int, ...]:
    """The tokens of each AR step.

    Args:
      split: "equal", or "cosine" (few tokens first).
      num_tokens: L, or how many of them are to be generated.
      num_ar_steps: S.
      explicit: sizes that are taken instead.

    Raises:
      UserError: an unknown split, S not in 1...L, or explicit sizes that don't sum to L.
    """
    check_choice("split", split, SPLITS)
    if explicit:
        return check_split_sizes(tuple(explicit), num_tokens)
    if split == "equal":
        return equal_split_sizes(num_tokens, num_ar_steps)
    return cosine_split_sizes(num_tokens, num_ar_steps)


def cosine_split_sizes(num_tokens: int, num_ar_steps: int) -> tuple[int, ...]:
    """Sizes of S AR steps that grow: after AR step s, L cos(π/2 s/S) tokens are yet to come.

    The masking schedule of MaskGIT (arXiv 2202.04200, section 3.3); each AR step has a token at
    least.

    Raises:
      UserError: S is not in 1...L.
    """
    equal_split_sizes(num_tokens, num_ar_steps)  # refuses
    sizes, left = [], num_tokens
    for ar_step in range(1, num_ar_steps + 1):
        to_come = math.floor(num_tokens * math.cos(math.pi / 2 * ar_step / num_ar_steps))
        # The cosine is above its chord, so that enough are left for the AR steps that follow; of the
        # last one it may be a rounding below 0.
        to_come = max(min(to_come, left - 1), 0)
        sizes.append(left - to_come)
        left = to_come
    return tuple(sorted(sizes))


def denoising_budgets(denoising_steps: str, num_ar_steps: int) -> tuple[str, ...]:
    """The respacing of each AR step.

    Args:
      denoising_steps: one respacing for all, such as "50" (see `diffusion.schedule.respace`); one
        for each, "50/20/10"; or a number that falls or grows evenly, "50:10", from the first AR step
        to the last.
      num_ar_steps: S.

    Raises:
      UserError: the text is malformed, or not of S AR steps.
    """
    if "/" in denoising_steps:
        budgets = tuple(part.strip() for part in denoising_steps.split("/"))
        if len(budgets) != num_ar_steps:
            raise UserError(
                f"denoising_steps {denoising_steps!r} is for {len(budgets)} AR steps, but there are"
                f" {num_ar_steps}; write one number for each, or a single one for all."
            )
        return budgets
    if ":" in denoising_steps:
        first, _, last = denoising_steps.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) and int(last)):
            raise UserError(
                f"denoising_steps {denoising_steps!r} is not understood; write FIRST:LAST, such as"
                " '50:10'."
            )
        change = (int(last) - int(first)) / max(num_ar_steps - 1, 1)
        return tuple(str(round(int(first) + change * i)) for i in range(num_ar_steps))
    return (denoising_steps,) * num_ar_steps
