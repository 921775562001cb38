"""Plans for generation: sizes and denoising steps of AR steps."""

import math

import pytest

from cfjax.errors import UserError
from cfjax.plans import cosine_split_sizes, denoising_budgets, split_sizes


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 49, 256])
def test_cosine_sizes_grow_and_sum(num_tokens):
    for num_ar_steps in range(1, num_tokens + 1):
        sizes = cosine_split_sizes(num_tokens, num_ar_steps)
        assert len(sizes) == num_ar_steps and sum(sizes) == num_tokens
        assert min(sizes) >= 1 and list(sizes) == sorted(sizes)


def test_cosine_sizes_follow_their_formula():
    """With many tokens a step, the tokens to come are L cos(π/2 s/S), rounded down."""
    sizes = cosine_split_sizes(1000, 8)
    for ar_step in range(1, 9):
        to_come = 1000 - sum(sizes[:ar_step])
        assert to_come == math.floor(1000 * math.cos(math.pi / 2 * ar_step / 8))


def test_split_sizes():
    assert split_sizes("equal", 10, 3) == (4, 3, 3)
    assert split_sizes("equal", 10, 3, (1, 9)) == (1, 9)
    assert split_sizes("cosine", 49, 4) == cosine_split_sizes(49, 4) != split_sizes("equal", 49, 4)


@pytest.mark.parametrize(
    ("text", "num_ar_steps", "expected"),
    [
        ("25", 3, ("25", "25", "25")),
        ("10,15", 2, ("10,15", "10,15")),
        ("50/20/10", 3, ("50", "20", "10")),
        ("50:10", 5, ("50", "40", "30", "20", "10")),
        ("10:50", 2, ("10", "50")),
        ("50:10", 1, ("50",)),
        ("9:2", 4, ("9", "7", "4", "2")),
    ],
)
def test_denoising_budgets(text, num_ar_steps, expected):
    assert denoising_budgets(text, num_ar_steps) == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: split_sizes("square", 9, 2), "unknown split 'square'"),
        (lambda: split_sizes("cosine", 9, 10), "num_ar_steps is 10, but .* takes 1 to 9"),
        (lambda: split_sizes("equal", 9, 2, (4, 4)), r"\[4, 4\] sum to 8, but must sum to the 9"),
        (lambda: denoising_budgets("5/5", 3), "'5/5' is for 2 AR steps, but there are 3"),
        (lambda: denoising_budgets("5:", 3), "'5:' is not understood"),
        (lambda: denoising_budgets("0:5", 3), "'0:5' is not understood"),
    ],
)
def test_bad_plans_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
