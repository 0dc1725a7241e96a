"""The loss of a variant at a cost, and the cost of a loss: read from completed runs where it has several lengths.

A run in mid-schedule is at a disadvantage, because its learning rate has not come down. Shapes: S seeds, L lengths.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moelm.compare.axes import Axis
from moelm.compare.variants import Variant
from moelm.runs.record import Array

Read = Literal["end of schedule", "between completed runs", "in mid-schedule"]

SAME_COST = 0.01
"""Relative difference below which a cost counts as that of a completed run."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The losses of a variant's runs at one cost."""

    read: Read
    losses: Array
    """`(S,)`: nats per token."""
    weights: tuple[float, ...] | None
    """`(L,)`: the weight of the final loss of each length, shortest first; None if it is not of final losses."""

    @property
    def loss(self) -> float:
        """Mean over the runs."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class CostOfLoss:
    """The cost at which a variant's loss is down to a given one."""

    cost: float | None = None
    """None if it never is."""
    at_most: bool = False
    """Whether it is an upper bound: the shortest of several lengths ends below that loss."""
    read: Read | None = None


def final_losses(variant: Variant) -> Array:
    """`(L, S)`: the final loss of each run of each length, shortest first."""
    return np.stack([length.final_losses for length in variant.lengths])


def end_costs(variant: Variant, axis: Axis) -> Array:
    """`(L,)`: the cost of each length, shortest first; a mean over seeds, so that all seeds are read at the same cost."""
    return np.array([length.cost(axis)[-1] for length in variant.lengths])


def has_ends(variant: Variant, axis: Axis) -> bool:
    """Whether a variant has several lengths whose costs increase; times measured on different machines may not."""
    costs = end_costs(variant, axis)
    return len(costs) > 1 and costs[0] > 0 and bool((np.diff(costs) > 0).all())


def read_loss(variant: Variant, axis: Axis, at: float) -> Reading:
    """The losses at a cost.

    Within 1% of the cost of a length, or above all of them, they are its final losses; between two lengths, the final
    losses of both, interpolated linearly in the logarithm of the cost; and otherwise those of the longest runs in
    mid-schedule, interpolated linearly between evaluations.
    """
    costs, losses_LS = end_costs(variant, axis), final_losses(variant)
    if not has_ends(variant, axis):
        costs, first = costs[-1:], len(costs) - 1
    else:
        first = 0
    if (weights := _weights(costs, at)) is not None:
        padded = np.concatenate([np.zeros(first), weights])
        complete = variant.is_complete
        read: Read = (
            "in mid-schedule" if not complete else "end of schedule" if weights.max() == 1 else "between completed runs"
        )
        return Reading(read, padded @ losses_LS, tuple(padded.tolist()))
    curve = variant.cost(axis)
    return Reading("in mid-schedule", np.array([np.interp(at, curve, each) for each in variant.losses]), None)


def _weights(costs: Array, at: float) -> Array | None:
    """The weight of each end at a cost; None below the first."""
    near = int(np.argmin(np.abs(costs - at)))
    if at >= costs[-1]:
        near = len(costs) - 1
    weights = np.zeros(len(costs))
    if at >= costs[-1] or abs(at - costs[near]) <= SAME_COST * costs[near]:
        weights[near] = 1.0
        return weights
    if at < costs[0]:
        return None
    above = int(np.searchsorted(costs, at))
    part = math.log(at / costs[above - 1]) / math.log(costs[above] / costs[above - 1])
    weights[above - 1 : above + 1] = 1 - part, part
    return weights


def read_cost(variant: Variant, axis: Axis, target: float, seed_index: int | None = None) -> CostOfLoss:
    """The cost at which the loss is down to `target`: its running minimum over the ends of several lengths, linear in the
    logarithm of the cost, or over the evaluations of a single length, linear in the cost.

    Args:
        seed_index: of one run of each length; default: the mean over them.
    """
    chosen = slice(None) if seed_index is None else slice(seed_index, seed_index + 1)
    if not has_ends(variant, axis):
        curve = variant.cost(axis)
        cost = cost_at_loss(curve, variant.losses[chosen].mean(axis=0), target)
        if cost is None:
            return CostOfLoss()
        at_end = variant.is_complete and cost >= (1 - SAME_COST) * curve[-1]
        return CostOfLoss(cost, False, "end of schedule" if at_end else "in mid-schedule")
    costs, losses = end_costs(variant, axis), final_losses(variant)[:, chosen].mean(axis=1)
    log_cost = cost_at_loss(np.log(costs), losses, target)
    if log_cost is None:
        return CostOfLoss()
    if losses[0] <= target:
        return CostOfLoss(float(costs[0]), bool(losses[0] < target), "end of schedule")
    cost = math.exp(log_cost)
    at_end = bool((np.abs(cost - costs) <= SAME_COST * costs).any())
    return CostOfLoss(cost, False, "end of schedule" if at_end else "between completed runs")


def cost_at_loss(cost: Array, loss: Array, target: float) -> float | None:
    """The cost at which a curve's running minimum reaches `target`, linear between its points; None if never."""
    best = np.minimum.accumulate(loss)
    reached = np.flatnonzero(best <= target)
    if not reached.size:
        return None
    i = int(reached[0])
    if i == 0:
        return float(cost[0])
    part = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))
