"""Power laws L(C) = E + A C^-a of the loss over the cost, with one E for all variants (Hoffmann et al. 2022, approach 3).

Shapes: P points of one side, S sides, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from moelm.compare.bootstrap import CONFIDENCE
from moelm.compare.ladder.multiplier import DECADE
from moelm.compare.ladder.points import Points
from moelm.runs.record import Array

MIN_SIZES = 4
"""Sizes of each variant; three parameters pass through three points whatever these are."""
HUBER_DELTA = 1e-3
"""Residuals of the log loss up to which their square counts, beyond which their absolute value does."""
RESAMPLES = 300
"""Fits are repeated for so many resamples."""
STARTS = (0.0, 0.3, 0.6, 0.8, 0.95)
"""Values of E that the search starts from, relative to the lowest loss."""
SMALLEST = 1e-3
"""Nats that E is not below."""
WIDEST = 0.5
"""Width of E's interval, relative to the lowest loss, from which the data do not identify E."""


@dataclass(frozen=True)
class PowerLaw:
    """One side's L(C) = E + A C^-a."""

    floor: float
    """E, in nats per token."""
    scale: float
    """A, in nats, at a cost of 1."""
    exponent: float
    """a."""
    exponent_low: float
    """The 95% interval of the exponent."""
    exponent_high: float
    residuals: tuple[float, ...]
    """Of the logarithm of the loss in each size: measured minus fitted."""

    def loss(self, cost: Array) -> Array:
        """Nats per token."""
        fitted: Array = self.floor + self.scale * cost**-self.exponent
        return fitted


@dataclass(frozen=True)
class LadderFit:
    """The power laws of all sides on one axis."""

    laws: tuple[PowerLaw, ...]
    floor_low: float
    """The 95% interval of E."""
    floor_high: float
    floor_identified: bool
    """Whether that interval excludes 0 and is narrow."""
    parameters_RK: Array
    """The parameters of each resample: E, then log A and a of each side."""

    @property
    def floor(self) -> float:
        """E, which all laws share."""
        return self.laws[0].floor

    def multiplier(self, side: int, cost: float) -> tuple[float, float, float] | None:
        """The multiplier of a side over the first at a cost of the side's, with its interval; None if it has none."""
        law = self.laws[side]
        best = np.array([[self.floor, *(x for each in self.laws for x in (math.log(each.scale), each.exponent))]])
        value = float(_multipliers(best, side, cost)[0])
        logs_R = _multipliers(self.parameters_RK, side, cost)
        if not math.isfinite(value) or law.exponent <= 0:
            return None
        low, high = np.quantile(logs_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest")
        return math.exp(value), math.exp(min(low, value)), math.exp(max(high, value))


def _multipliers(parameters_RK: Array, side: int, cost: float) -> Array:
    """`(R,)`: log multipliers; the excess of the loss over E is the same on both sides, so E itself cancels."""
    log_scale_R, exponent_R = parameters_RK[:, 1 + 2 * side], parameters_RK[:, 2 + 2 * side]
    reference_scale_R, reference_exponent_R = parameters_RK[:, 1], parameters_RK[:, 2]
    log_excess_R = log_scale_R - exponent_R * math.log(cost)
    logs: Array = (reference_scale_R - log_excess_R) / reference_exponent_R - math.log(cost)
    return logs.clip(-2 * DECADE, 2 * DECADE)


def fit_ladder(sides: Sequence[Points]) -> LadderFit | None:
    """The power laws of all sides; None if one has fewer than four sizes."""
    if min(len(side.costs_P) for side in sides) < MIN_SIZES:
        return None
    lowest = float(np.exp(min(side.losses_P.min() for side in sides)))
    costs = [side.costs_P for side in sides]
    losses = [side.losses_P for side in sides]
    starts = [_start(costs, losses, part * lowest) for part in STARTS]
    best, residuals = min((_minimize(costs, losses, start) for start in starts), key=lambda found: found[2])[:2]
    resamples = []
    for r in range(min(RESAMPLES, len(sides[0].losses_RP))):
        drawn = [side.costs_RP[r] for side in sides], [side.losses_RP[r] for side in sides]
        resamples.append(_minimize(*drawn, best)[0])
    parameters_RK = np.stack(resamples)
    low_K, high_K = np.quantile(parameters_RK, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    splits = np.split(residuals, np.cumsum([len(each) for each in losses])[:-1])
    laws = tuple(
        PowerLaw(
            floor=float(best[0]),
            scale=math.exp(best[1 + 2 * i]),
            exponent=float(best[2 + 2 * i]),
            exponent_low=float(low_K[2 + 2 * i]),
            exponent_high=float(high_K[2 + 2 * i]),
            residuals=tuple((-each).tolist()),
        )
        for i, each in enumerate(splits)
    )
    narrow = high_K[0] - low_K[0] < WIDEST * lowest
    identified = bool(narrow and low_K[0] > 0.01 * lowest)
    return LadderFit(laws, float(low_K[0]), float(high_K[0]), identified, parameters_RK)


def _start(costs: Sequence[Array], losses: Sequence[Array], floor: float) -> Array:
    """Straight lines through log(L - E) over log C, for an assumed E."""
    parameters = [floor]
    for costs_P, losses_P in zip(costs, losses, strict=True):
        excess_P = np.log(np.maximum(np.exp(losses_P) - floor, 1e-3))
        slope, intercept = np.polyfit(costs_P, excess_P, 1)
        parameters += [intercept, -slope]
    return np.array(parameters)


def _minimize(costs: Sequence[Array], losses: Sequence[Array], start: Array) -> tuple[Array, Array, float]:
    """Parameters, residuals of all points, and the Huber loss.

    Costs are taken relative to their mean, without which A and a would be almost collinear.
    """
    center = float(np.concatenate(costs).mean())
    lowest = float(np.exp(min(each.min() for each in losses)))

    def residuals(parameters_K: Array) -> Array:
        fitted = [
            np.logaddexp(np.log(parameters_K[0]), parameters_K[1 + 2 * i] - parameters_K[2 + 2 * i] * (costs_P - center))
            for i, costs_P in enumerate(costs)
        ]
        each: Array = np.concatenate(fitted) - np.concatenate(losses)
        return each

    centered = start.copy()
    centered[1::2] -= centered[2::2] * center
    centered[0] = min(max(start[0], 2 * SMALLEST), 0.999 * lowest)
    low, high = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    low[0], high[0] = SMALLEST, lowest
    squares = least_squares(residuals, centered, bounds=(low, high), x_scale="jac")
    # From the start itself, the search often ends early: far from the optimum the Huber loss has little curvature.
    found = least_squares(residuals, squares.x, bounds=(low, high), loss="huber", f_scale=HUBER_DELTA, x_scale="jac")
    parameters = found.x.copy()
    parameters[1::2] += parameters[2::2] * center
    return parameters, residuals(found.x), float(found.cost)
