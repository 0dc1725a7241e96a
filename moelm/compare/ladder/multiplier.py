"""The compute multiplier: the cost at which the reference has a variant's loss, over the variant's own.

It is read between the reference's measured sizes by monotone interpolation of log cost over log loss (Fritsch and Carlson
1980). Shapes: P points, R resamples, Q losses.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.interpolate import PchipInterpolator

from moelm.compare.bootstrap import CONFIDENCE
from moelm.compare.ladder.points import Points
from moelm.runs.record import Array

DECADE = math.log(10)
"""How far costs are extrapolated beyond the measured ones."""
Read = Literal["measured range", "extrapolated", "out of range"]


@dataclass(frozen=True)
class Multiplier:
    """A ratio of costs; above 1, the variant is cheaper than the reference."""

    value: float | None
    """None if the reference's cost is more than a decade beyond its measured ones."""
    low: float | None
    """The 95% interval; None for a bound beyond that decade."""
    high: float | None
    read: Read
    """Whether the reference has losses on both sides of the variant's."""


def cost_of_loss(points_costs_P: Array, points_losses_P: Array, losses_Q: Array) -> Array:
    """`(Q,)`: log costs at which a curve has given log losses.

    Sizes that are no better than a cheaper one are left out. Beyond the ends, the line through the two nearest points is
    continued; more than a decade beyond, the cost is infinite (or minus infinity).
    """
    better = points_losses_P < np.minimum.accumulate(np.concatenate([[np.inf], points_losses_P[:-1]]))
    x_P, y_P = -points_losses_P[better], points_costs_P[better]
    wanted_Q = -np.asarray(losses_Q)
    if len(x_P) < 2:
        return np.where(wanted_Q > x_P[0], np.inf, -np.inf)
    costs_Q: Array = PchipInterpolator(x_P, y_P, extrapolate=False)(wanted_Q)
    for end, beside, beyond, limit in ((0, 1, wanted_Q < x_P[0], -np.inf), (-1, -2, wanted_Q > x_P[-1], np.inf)):
        slope = (y_P[end] - y_P[beside]) / (x_P[end] - x_P[beside])
        line_Q = y_P[end] + slope * (wanted_Q - x_P[end])
        costs_Q = np.where(beyond, np.where(abs(line_Q - y_P[end]) <= DECADE, line_Q, limit), costs_Q)
    return costs_Q


def log_multipliers(reference: Points, losses_Q: Array, costs_Q: Array) -> Array:
    """`(Q,)`: logarithms of the multipliers of points with these log losses and log costs."""
    return cost_of_loss(reference.costs_P, reference.losses_P, losses_Q) - costs_Q


def resampled_log_multipliers(reference: Points, losses_RQ: Array, costs_RQ: Array) -> Array:
    """`(R, Q)`: the same for each resample."""
    rows = zip(reference.costs_RP, reference.losses_RP, losses_RQ, strict=True)
    return np.stack([cost_of_loss(*row) for row in rows]) - costs_RQ


def multipliers(reference: Points, side: Points) -> tuple[list[Multiplier], Multiplier]:
    """The multiplier of a side at each of its sizes, and their geometric mean over the sizes in the measured range."""
    logs_P = log_multipliers(reference, side.losses_P, side.costs_P)
    logs_RP = resampled_log_multipliers(reference, side.losses_RP, side.costs_RP)
    inside_P = (side.losses_P <= reference.losses_P[0]) & (side.losses_P >= reference.losses_P.min())
    each = [_summarize(log, logs_R, bool(inside)) for log, logs_R, inside in zip(logs_P, logs_RP.T, inside_P, strict=True)]
    if not inside_P.any():
        return each, Multiplier(None, None, None, "out of range")
    with np.errstate(invalid="ignore"):  # infinities of both signs have no mean
        means_R = logs_RP[:, inside_P].mean(axis=1)
    return each, _summarize(float(logs_P[inside_P].mean()), np.nan_to_num(means_R, nan=np.inf, posinf=np.inf), True)


def _summarize(log: float, logs_R: Array, inside: bool) -> Multiplier:
    tail = (1 - CONFIDENCE) / 2
    # Not interpolated, because bounds may be infinite.
    bounds = (np.quantile(logs_R, part, method="nearest") for part in (tail, 1 - tail))
    value, low, high = (math.exp(each) if math.isfinite(each) else None for each in (log, *bounds))
    read: Read = "measured range" if inside else "out of range" if value is None else "extrapolated"
    return Multiplier(value, low, high, read)
