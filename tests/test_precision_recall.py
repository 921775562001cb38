"""Precision and recall against ADM's arithmetic in NumPy, and what they must refuse."""

import numpy as np
import pytest

from cfjax.errors import UserError
from cfjax.evaluation.precision_recall import _squared_distances, precision_recall


def plain_distances(a, b, is_adm):
    """Squared, of one block, in NumPy's float16 operation by operation, or in float32."""
    for dtype in [np.float16] * is_adm + [np.float32]:
        x, y = a.astype(dtype), b.astype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = [np.square(z).astype(np.float32).sum(1).astype(dtype) for z in (x, y)]
            products = (x.astype(np.float32) @ y.astype(np.float32).T).astype(dtype)
            result = np.maximum(norms[0][:, None] - 2 * products + norms[1], dtype(0))
        if np.isfinite(result).all():
            break
    return result.astype(np.float32)


def plain_precision_recall(reference, samples, k, block_size, is_adm):
    """ADM's manifolds, block by block."""

    def distances(a, b):
        def parts(x):
            return [x[begin : begin + block_size] for begin in range(0, len(x), block_size)]

        return np.block([[plain_distances(x, y, is_adm) for y in parts(b)] for x in parts(a)])

    radii = [np.partition(distances(x, x), k, axis=1)[:, k] for x in (reference, samples)]
    between = distances(reference, samples)
    precision = (between <= radii[0][:, None]).any(0).mean()
    recall = (between <= radii[1][None]).any(1).mean()
    return precision, recall


def clusters(num_samples, seed, centres=6, width=1.0):
    """On a grid of eighths, so that sums in float32 are exact in any order; one is where padding is."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(0).normal(size=(6, 8)) * 4
    middles[0] = 0
    x = middles[rng.integers(centres, size=num_samples)] + width * rng.normal(size=(num_samples, 8))
    return (np.round(x * 8) / 8).astype(np.float32)


@pytest.mark.parametrize("arithmetic", ["adm", "float32"])
@pytest.mark.parametrize("num_large", [0, 64, 230])  # of vectors at which float16 overflows
@pytest.mark.parametrize(
    ("sizes", "k", "block_size"), [((230, 170), 3, 10_000), ((230, 170), 1, 64), ((64, 90), 5, 64)]
)
def test_precision_and_recall_equal_a_plain_loop(sizes, k, block_size, num_large, arithmetic):
    """Exactly, whatever the blocks: padding is in no manifold and covers nothing."""
    reference = clusters(sizes[0], seed=1, width=0.8)
    samples = clusters(sizes[1], seed=2, centres=4)
    reference[:num_large] *= 100
    samples[:num_large] *= 100
    expected = plain_precision_recall(reference, samples, k, block_size, arithmetic == "adm")
    found = precision_recall(reference, samples, k, arithmetic, block_size)
    assert (found.precision, found.recall) == expected
    assert (found.k, found.arithmetic) == (k, arithmetic)
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and found.precision != found.recall


@pytest.mark.parametrize("scale", [1, 100])  # at 100 float16 overflows
def test_adms_distances_round_as_numpys_float16(scale):
    """Bit for bit, after each operation; with many equal vectors, whose distances come out below 0."""
    a, b = scale * clusters(90, seed=1), scale * clusters(70, seed=2)
    a[:40] = b[:40]
    expected = plain_distances(a, b, is_adm=True)
    np.testing.assert_array_equal(_squared_distances(a, b, "adm"), expected)
    assert (expected == plain_distances(a, b, is_adm=False)).all() == (scale == 100)


def test_a_ball_holds_its_border_and_needs_its_neighbours():
    line = np.stack([np.arange(4.0), np.zeros(4)], axis=1)
    beyond = line + np.array([6.0, 0.0])  # 6 is 3 away from 3, and 3 is the radius of both
    found = precision_recall(line, beyond)
    assert (found.precision, found.recall) == (0.25, 0.25)
    assert (found.k, found.arithmetic) == (3, "adm")
    for arguments, words in (
        ((line[:3], beyond), "3 reference images and 4 samples have no 3 neighbours"),
        ((line, beyond, 4), "more than 4 of both"),
        ((line, beyond, 0), "k=0"),
        ((line, beyond, 3, "adm", 0), "block_size=0"),
        ((line, beyond, 3, "float16"), "unknown arithmetic 'float16'"),
        ((line, beyond[:, :1]), "sizes 2 and 1"),
        ((line, beyond + np.inf), "not finite"),
    ):
        with pytest.raises(UserError, match=words):
            precision_recall(*arguments)
