"""Ladders with a known law, from which losses on documents and of seeds are drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moelm.compare.bootstrap import resample_sums
from moelm.compare.ladder.points import Points, resample_log_losses
from moelm.runs.record import Array

FLOOR, SCALE, EXPONENT = 1.4, 12.0, 0.2
"""L(C) = FLOOR + SCALE (C / 1e10)^-EXPONENT."""


class Planted(NamedTuple):
    """What was drawn, of the reference and of a side with a multiplier."""

    reference: Points
    side: Points


def law(costs: Array, multiplier: float = 1.0, floor: float = FLOOR) -> Array:
    """Losses at costs in FLOPs."""
    losses: Array = floor + SCALE * (multiplier * costs / 1e10) ** -EXPONENT
    return losses


def plant(
    rng: np.random.Generator,
    multiplier: float = 2.0,
    factor: float = 3.0,
    sizes: int = 4,
    seeds: int = 3,
    seed_std: float = 0.006,
    documents: int = 400,
    resamples: int = 300,
    floor: float = FLOOR,
) -> Planted:
    """A ladder whose largest sizes have one seed; the reference has one size more.

    Documents differ in difficulty, and in how much they gain from size; seeds vary the logarithm of the loss.

    Args:
        multiplier: the reference's cost over the side's at equal loss.
        factor: of the cost from one size to the next.
        documents: 0 for losses without documents.
    """
    costs = [1e12 * factor ** np.arange(count) for count in (sizes + 1, sizes)]
    losses = np.concatenate([law(costs[0], floor=floor), law(costs[1], multiplier, floor)])
    numbers = [seeds] * sizes + [1] + [seeds] * (sizes - 1) + [1]
    difficulty, gain = rng.normal(0, 0.3, documents), rng.normal(0, 0.05, documents)
    log_runs: list[Array] = []
    nats: list[Array] = []
    for loss, number in zip(losses, numbers, strict=True):
        factors = np.exp(rng.normal(0, seed_std, number))
        of_documents = loss * np.exp(difficulty) * (1 + gain * (loss - losses.mean()))
        log_runs.append(np.log((of_documents.mean() if documents else loss) * factors))
        nats.append(of_documents * factors.mean())
    resampled = None
    if documents:
        tokens_R, nats_RP = resample_sums(np.ones(documents), np.stack(nats), resamples)
        resampled = (nats_RP / tokens_R[:, None])[:resamples]
    losses_RP = resample_log_losses(log_runs, resampled, resamples)
    means = np.array([np.log(np.exp(each).mean()) for each in log_runs])
    return Planted(*(_points(costs, means, losses_RP, part) for part in (0, 1)))


def _points(costs: Sequence[Array], means: Array, losses_RP: Array, part: int) -> Points:
    rows = slice(0, len(costs[0])) if part == 0 else slice(len(costs[0]), None)
    costs_P = np.log(costs[part])
    return Points(costs_P, means[rows], np.tile(costs_P, (len(losses_RP), 1)), losses_RP[:, rows])
