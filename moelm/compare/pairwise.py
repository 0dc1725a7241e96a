"""Two variants compared: the cost at which one reaches the other's final loss, and both losses at equal cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moelm.compare.axes import TIMED_AXES, Axis
from moelm.compare.bootstrap import BootstrapInterval, PairedBootstrap, PairedDifference
from moelm.compare.reading import Read, Reading, read_cost, read_loss
from moelm.compare.seed_std import student_t
from moelm.compare.variants import Variant

NEGLIGIBLE = 0.005
"""Nats per token below which two losses count as equal, however certain the difference is."""


@dataclass(frozen=True)
class CostToReach:
    """What a variant spends until its loss is down to the final loss of another."""

    cost: float | None
    """Tokens, FLOPs, seconds or dollars; None if it never reaches that loss."""
    other_cost: float
    """What the other spent in total."""
    at_most: bool = False
    """Whether the cost is an upper bound, and the ratio a lower one."""
    read: Read | None = None
    """How the cost was read."""
    ratio_low: float | None = None
    """The 95% interval of the ratio over seeds; None unless both have the same seeds, at least two, and all reach it."""
    ratio_high: float | None = None

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
    read_a: Read = "end of schedule"
    """How the first loss was read."""
    read_b: Read = "end of schedule"
    interval: BootstrapInterval | None = None
    """The paired difference at this cost; None unless both were read from final losses on the same documents."""
    seeds_ahead: int = 0
    """Of the seeds that both have, those in which the first has the lower loss."""
    seeds_shared: int = 0

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


def compare_pair(a: Variant, b: Variant, axes: tuple[Axis, ...], documents: PairedBootstrap) -> PairResult:
    """Measure variant `a` against variant `b`."""
    paired = documents.difference(a, b)
    final = None if paired is None else paired.overall
    return PairResult(
        a=a.name,
        b=b.name,
        target_loss=float(b.val.loss[-1]),
        cost_to_reach={axis: cost_to_reach(a, b, axis) for axis in axes},
        equal_cost={axis: compare_at_equal_cost(a, b, axis, documents, final) for axis in axes},
        paired=paired,
    )


def cost_to_reach(a: Variant, b: Variant, axis: Axis) -> CostToReach:
    """What `a` spends until its loss is down to the final loss of `b`."""
    reached = read_cost(a, axis, float(b.val.loss[-1]))
    other_cost = float(b.cost(axis)[-1])
    interval = _ratio_interval(a, b, axis, other_cost) if reached.cost and not reached.at_most else None
    return CostToReach(reached.cost, other_cost, reached.at_most, reached.read, *(interval or (None, None)))


def _ratio_interval(a: Variant, b: Variant, axis: Axis, other_cost: float) -> tuple[float, float] | None:
    """The 95% interval of the ratio from pairs of runs with the same seed, in the logarithm."""
    if a.seeds != b.seeds or len(a.seeds) < 2:
        return None
    reached = [read_cost(a, axis, float(target), seed) for seed, target in enumerate(b.final_losses)]
    costs = [each.cost for each in reached if each.cost and not each.at_most]
    if len(costs) < len(reached) or not other_cost:
        return None
    logs = np.log(other_cost / np.array(costs))
    mean, half_width = float(logs.mean()), student_t(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return math.exp(mean - half_width), math.exp(mean + half_width)


def compare_at_equal_cost(
    a: Variant, b: Variant, axis: Axis, documents: PairedBootstrap, final: BootstrapInterval | None
) -> EqualCost | None:
    """Both losses at the largest cost that both reached; None without overlap.

    Args:
        final: the interval of the final losses, if known; a difference in mid-schedule is taken to be as uncertain, and at
            equal time also as uncertain as its variation between pairs of runs with the same seed.
    """
    cost_a, cost_b = a.cost(axis), b.cost(axis)
    at = float(min(cost_a[-1], cost_b[-1]))
    if at < max(cost_a[0], cost_b[0]):
        return None
    reading_a, reading_b = read_loss(a, axis, at), read_loss(b, axis, at)
    gain = reading_b.loss - reading_a.loss
    interval = documents.interval(a, reading_a, b, reading_b)
    half_widths = [NEGLIGIBLE]
    if interval is not None:
        half_widths.append(interval.half_width(gain))
    else:
        half_widths.append(0.0 if final is None else final.half_width(gain))
        half_widths.append(_timing_half_width(a, b) if axis in TIMED_AXES else 0.0)
    gains = _gains_by_seed(a, reading_a, b, reading_b)
    return EqualCost(
        at=at,
        loss_a=reading_a.loss,
        loss_b=reading_b.loss,
        margin=max(half_widths),
        read_a=reading_a.read,
        read_b=reading_b.read,
        interval=interval,
        seeds_ahead=sum(each > 0 for each in gains),
        seeds_shared=len(gains),
    )


def _gains_by_seed(a: Variant, reading_a: Reading, b: Variant, reading_b: Reading) -> list[float]:
    """The gain of `a` in each seed that both have."""
    losses_b = dict(zip(b.seeds, reading_b.losses.tolist(), strict=True))
    losses_a = zip(a.seeds, reading_a.losses.tolist(), strict=True)
    return [losses_b[seed] - loss for seed, loss in losses_a if seed in losses_b]


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
