"""Multipliers: exact where the law is simple, and with intervals that contain the truth as often as they say."""

import math

import numpy as np
import pytest

from moelm.compare.ladder.multiplier import Multiplier, cost_of_loss, multipliers
from moelm.compare.ladder.points import Points, seed_noise
from moelm.compare.seed_std import pooled_std, student_t
from tests.compare.ladder.planted import law, plant


def exact(costs: list[float], losses: list[float]) -> Points:
    costs_P, losses_P = np.log(costs), np.log(losses)
    return Points(costs_P, losses_P, costs_P[None], losses_P[None])


def test_a_power_law_is_read_exactly() -> None:
    """In logarithms it is a straight line, which interpolation and its continuation keep."""
    costs = np.array([1.0, 10.0, 100.0])
    wanted = np.array([3.0, 30.0, 0.2, 900.0])
    read = cost_of_loss(np.log(costs), np.log(5 * costs**-0.3), np.log(5 * wanted**-0.3))
    assert np.exp(read) == pytest.approx(wanted)


def test_between_sizes_a_law_with_a_floor_is_read_within_two_percent() -> None:
    costs = 1e12 * 3.0 ** np.arange(5)
    wanted = np.geomspace(costs[0], costs[-1], 50)
    read = cost_of_loss(np.log(costs), np.log(law(costs)), np.log(law(wanted)))
    assert np.exp(read) == pytest.approx(wanted, rel=0.02)


def test_more_than_a_decade_beyond_the_ends_there_is_no_cost() -> None:
    costs = np.array([1.0, 10.0])
    beyond = np.array([5 * 101**-0.3, 5 * 0.099**-0.3])
    assert cost_of_loss(np.log(costs), np.log(5 * costs**-0.3), np.log(beyond)).tolist() == [math.inf, -math.inf]


def test_a_size_that_is_no_better_than_a_cheaper_one_is_left_out() -> None:
    costs, losses = np.log([1.0, 10.0, 20.0, 100.0]), np.log([4.0, 3.0, 3.1, 2.0])
    kept = [0, 1, 3]
    wanted = np.log([3.5, 3.0, 2.5])
    assert cost_of_loss(costs, losses, wanted).tolist() == cost_of_loss(costs[kept], losses[kept], wanted).tolist()


def test_a_curve_that_never_falls_has_the_cost_of_no_other_loss() -> None:
    read = cost_of_loss(np.log([1.0, 10.0]), np.log([3.0, 3.0]), np.log([2.9, 3.0, 3.1]))
    assert read.tolist() == [math.inf, -math.inf, -math.inf]


def test_sides_are_read_at_each_size_and_in_the_mean() -> None:
    costs = [1.0, 10.0, 100.0, 1000.0]
    reference = exact(costs, [5 * cost**-0.3 for cost in costs])
    side = exact([1.0, 10.0, 500.0], [5 * (factor * cost) ** -0.3 for cost, factor in ((1.0, 2), (10.0, 8), (500.0, 4))])
    each, mean = multipliers(reference, side)
    assert [found.value for found in each] == pytest.approx([2, 8, 4])
    assert [found.read for found in each] == ["measured range", "measured range", "extrapolated"]
    assert mean.value == pytest.approx(4)  # the geometric mean of 2 and 8


def test_a_side_without_losses_in_the_range_has_no_mean() -> None:
    reference = exact([1.0, 10.0], [4.0, 3.0])
    each, mean = multipliers(reference, exact([1.0, 10.0], [0.2, 0.1]))
    assert [found.value for found in each] == [None, None]
    assert mean == Multiplier(None, None, None, "out of range")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_coverage(factor: float) -> None:
    """Of 200 planted ladders, the 95% intervals contain the true multiplier of 2 in 90 to 99%."""
    rng = np.random.default_rng(0)
    covered = np.zeros(3)
    for _ in range(200):
        planted = plant(rng, multiplier=2.0, factor=factor)
        each, mean = multipliers(planted.reference, planted.side)
        found = (mean, each[0], each[2])
        covered += [(one.low or 0) <= 2 <= (one.high or math.inf) for one in found]
    assert (covered >= 180).all(), covered
    assert (covered <= 198).all(), covered


def test_a_single_points_interval_is_that_of_students_t() -> None:
    values = [np.array([1.0, 1.1, 1.3]), np.array([2.0, 2.3, 2.2])]
    std = pooled_std(values)
    assert std is not None
    noise = seed_noise(values, seed=0, resamples=200_000)
    expected = student_t(std.degrees) * std.std / math.sqrt(3)
    assert np.quantile(noise[:, 0], 0.975) == pytest.approx(expected, rel=0.03)
    assert std.degrees == 4


def test_without_two_seeds_there_is_no_noise() -> None:
    assert not seed_noise([np.array([1.0]), np.array([2.0])], seed=0, resamples=10).any()
