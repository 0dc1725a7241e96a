"""The search for the best learning rate in scripts/rate_study.py, on losses that are known."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from rate_study import find_best, vertex


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
