"""Fits of power laws: planted laws are found, and what the data do not show is not claimed."""

import numpy as np
import pytest

from moelm.compare.ladder.fit import LadderFit, fit_ladder
from tests.compare.ladder.planted import EXPONENT, FLOOR, SCALE, law, plant


def fit(seed: int = 0, resamples: int = 60, **settings: float) -> LadderFit:
    planted = plant(np.random.default_rng(seed), resamples=resamples, documents=0, **settings)  # type: ignore[arg-type]
    found = fit_ladder(planted)
    assert found is not None
    return found


def test_a_law_without_noise_is_found() -> None:
    found = fit(seed_std=0.0, factor=5.0)
    assert found.floor == pytest.approx(FLOOR, abs=0.01)
    assert [each.exponent for each in found.laws] == pytest.approx([EXPONENT, EXPONENT], abs=0.002)
    assert found.laws[0].scale * 1e10**-EXPONENT == pytest.approx(SCALE, rel=0.03)
    costs = 1e12 * 5.0 ** np.arange(7)
    assert found.laws[0].loss(costs) == pytest.approx(law(costs), rel=2e-3)
    assert max(abs(each) for one in found.laws for each in one.residuals) < 1e-3
    assert found.floor_identified


def test_the_multiplier_of_the_fit_is_the_planted_one_beyond_the_sizes() -> None:
    found = fit(seed_std=0.0, factor=5.0).multiplier(1, cost=1e12 * 5.0**4)
    assert found is not None
    assert found[0] == pytest.approx(2, rel=0.02)


def test_one_outlier_moves_the_fit_little() -> None:
    """The Huber loss, not squares."""
    planted = plant(np.random.default_rng(0), seed_std=0.0, documents=0, factor=5.0, sizes=6, resamples=5)
    planted.side.losses_P[2] += 0.03
    found = fit_ladder(planted)
    assert found is not None
    assert found.laws[1].exponent == pytest.approx(EXPONENT, abs=0.01)
    assert found.laws[1].residuals[2] == pytest.approx(0.03, abs=0.005)


def test_narrow_noisy_ladders_do_not_identify_the_floor() -> None:
    found = [fit(seed, factor=1.6, seed_std=0.02) for seed in range(4)]
    assert not any(each.floor_identified for each in found)
    assert sum(each.floor_low < FLOOR < each.floor_high for each in found) >= 3


def test_a_law_without_a_floor_does_not_identify_one() -> None:
    found = fit(floor=0.0, factor=3.0, seed_std=0.004)
    assert not found.floor_identified
    assert found.floor_low < 0.1


@pytest.mark.slow(seconds=20)
def test_intervals_contain_the_planted_law() -> None:
    rng, count = np.random.default_rng(1), 12
    covered = np.zeros(3)
    for _ in range(count):
        found = fit_ladder(plant(rng, factor=5.0, seed_std=0.004, documents=0, resamples=60))
        assert found is not None
        covered += [
            found.floor_low <= FLOOR <= found.floor_high,
            *(each.exponent_low <= EXPONENT <= each.exponent_high for each in found.laws),
        ]
    assert (covered >= count - 3).all(), covered


def test_three_sizes_have_no_fit() -> None:
    planted = plant(np.random.default_rng(0), sizes=3, documents=0, resamples=5)
    assert fit_ladder(planted) is None
