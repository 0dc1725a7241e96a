"""Two variants compared: the cost at which one reaches the other's final loss, and both losses at equal cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moelm.compare.axes import TIMED_AXES, Axis
from moelm.compare.bootstrap import BootstrapInterval, PairedDifference, student_t
from moelm.compare.variants import Variant
from moelm.runs.record import Array

NEGLIGIBLE = 0.005
"""Nats per token below which two losses count as equal, however certain the difference is."""


@dataclass(frozen=True)
class CostToReach:
    """What a variant spends until its loss is down to the final loss of another."""

    cost: float | None
    """Tokens, FLOPs, seconds or dollars; None if it never reaches that loss."""
    other_cost: float
    """What the other spent in total."""

    @property
    def ratio(self) -> float | None:
        """The other's cost over this one; above 1, the variant is cheaper."""
        return self.other_cost / self.cost if self.cost else None


@dataclass(frozen=True)
class EqualCost:
    """The losses of two variants at the same cost."""

    at: float
    """Tokens, FLOPs, seconds or dollars: the largest cost that both have reached."""
    loss_a: float
    loss_b: float
    margin: float = NEGLIGIBLE
    """Nats below which the difference is negligible or may be chance."""

    @property
    def gain(self) -> float:
        """Nats by which the first is better."""
        return self.loss_b - self.loss_a

    @property
    def negligible(self) -> bool:
        """Whether the difference is too small to matter."""
        return abs(self.gain) < NEGLIGIBLE - 1e-9

    @property
    def tie(self) -> bool:
        """Whether the difference is too small, or too uncertain, to name a winner."""
        return abs(self.gain) < self.margin - 1e-9  # a difference of two decimal losses is off by a few ulps


@dataclass(frozen=True)
class PairResult:
    """Variant `a` measured against variant `b`."""

    a: str
    b: str
    target_loss: float
    """Final validation loss of `b`, in nats per token."""
    cost_to_reach: Mapping[Axis, CostToReach]
    equal_cost: Mapping[Axis, EqualCost | None]
    """None where the evaluations of the two have no cost in common."""
    paired: PairedDifference | None
    """None unless both have saved their losses on the same documents."""


def compare_pair(a: Variant, b: Variant, axes: tuple[Axis, ...], paired: PairedDifference | None) -> PairResult:
    """Measure variant `a` against variant `b`.

    Args:
        paired: their difference on the same documents, if known.
    """
    target = float(b.val.loss[-1])
    interval = None if paired is None else paired.overall
    return PairResult(
        a=a.name,
        b=b.name,
        target_loss=target,
        cost_to_reach={
            axis: CostToReach(cost_at_loss(a.cost(axis), a.val.loss, target), float(b.cost(axis)[-1])) for axis in axes
        },
        equal_cost={axis: compare_at_equal_cost(a, b, axis, interval) for axis in axes},
        paired=paired,
    )


def cost_at_loss(cost: Array, loss: Array, target: float) -> float | None:
    """The cost at which a curve's running minimum reaches `target`, linear between evaluations; None if never."""
    best = np.minimum.accumulate(loss)
    reached = np.flatnonzero(best <= target)
    if not reached.size:
        return None
    i = int(reached[0])
    if i == 0:
        return float(cost[0])
    part = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))


def compare_at_equal_cost(a: Variant, b: Variant, axis: Axis, interval: BootstrapInterval | None) -> EqualCost | None:
    """Both losses at the largest cost that both reached, linear between evaluations; None without overlap.

    Args:
        interval: that of the final losses, if known; a difference at equal cost is taken to be as uncertain.
    """
    cost_a, cost_b = a.cost(axis), b.cost(axis)
    at = min(cost_a[-1], cost_b[-1])
    if at < max(cost_a[0], cost_b[0]):
        return None
    loss_a, loss_b = float(np.interp(at, cost_a, a.val.loss)), float(np.interp(at, cost_b, b.val.loss))
    half_width = 0.0 if interval is None else interval.half_width(loss_b - loss_a)
    timing_half_width = _timing_half_width(a, b) if axis in TIMED_AXES else 0.0
    return EqualCost(float(at), loss_a, loss_b, max(NEGLIGIBLE, half_width, timing_half_width))


def _timing_half_width(a: Variant, b: Variant) -> float:
    """Half width of the 95% interval of the gain at equal time, from pairs of runs with the same seed; 0 without two."""
    if a.seeds != b.seeds or len(a.seeds) < 2:
        return 0.0
    gains = []
    runs = zip(a.column("seconds"), b.column("seconds"), a.losses, b.losses, strict=True)
    for seconds_a, seconds_b, losses_a, losses_b in runs:
        at = min(seconds_a[-1], seconds_b[-1])
        gains.append(float(np.interp(at, seconds_b, losses_b) - np.interp(at, seconds_a, losses_a)))
    return student_t(len(gains) - 1) * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
