"""The search for the best learning rate in scripts/rate_study.py, on losses that are known; and matched experts of
scripts/routing_controls.py."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from rate_study import find_best, vertex
from routing_controls import matched_share


@pytest.mark.parametrize("best", [-5.3, 0.0, 1.4, 6.5])
def test_rates_are_added_until_the_best_has_two_on_each_side(best: float) -> None:
    """Parabolas of two seeds whose best rates are half a factor of sqrt(2) apart."""
    found = find_best(lambda power: [2 + 0.01 * (power - best - side) ** 2 for side in (-0.25, 0.25)])
    nearest = min(found.losses, key=lambda power: sum(found.losses[power]))
    assert {nearest + side for side in (-2, -1, 0, 1, 2)} <= found.losses.keys()
    assert found.factor == pytest.approx(2 ** (best / 2))
    assert found.of_seeds == pytest.approx([2 ** ((best - 0.25) / 2), 2 ** ((best + 0.25) / 2)])


def test_losses_that_are_not_convex_have_their_smallest() -> None:
    assert vertex({-2: 3.0, -1: 3.1, 0: 2.9, 1: 3.2, 2: 3.1, 3: 2.0}) == 3


def test_matched_experts_are_found_behind_a_permutation() -> None:
    """Of top-2 choices, one is the same expert under another number; the other is random."""
    rng = np.random.default_rng(0)
    counts, permutation = np.zeros((2, 1, 8, 8), dtype=np.int64), rng.permutation(8)
    for half in (0, 1):
        for _ in range(4000):
            ours, theirs = rng.choice(8, 2, replace=False), rng.choice(8, 2, replace=False)
            theirs[0] = permutation[ours[0]]
            for a in ours:
                for b in theirs:
                    counts[half, 0, a, b] += 1
    assert matched_share(counts, top_k=2) == pytest.approx(0.5 + 0.5 * 2 / 8, abs=0.02)
