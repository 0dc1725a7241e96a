"""A ladder's measurements: the final loss and the cost of each variant in each size, and their joint resamples.

Shapes: P points (a variant in a size), R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from moelm.compare.axes import Axis
from moelm.compare.bootstrap import resample_sums
from moelm.compare.reading import SAME_COST
from moelm.compare.seed_std import SeedStd, pooled_std
from moelm.compare.variants import Variant
from moelm.errors import MoelmError
from moelm.runs.record import Array

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Points:
    """One variant in all its sizes, on one axis of cost; everything is a natural logarithm."""

    costs_P: Array
    """Of a run, the smallest first."""
    losses_P: Array
    """Final losses, means over seeds."""
    costs_RP: Array
    losses_RP: Array


@dataclass(frozen=True, eq=False)
class Side:
    """One variant in all its sizes."""

    name: str
    sizes: Mapping[str, Variant]
    """By label, in the order of their training FLOPs."""


@dataclass(frozen=True, eq=False)
class Ladder:
    """All sides; the first is the reference."""

    sides: tuple[Side, ...]

    @cached_property
    def variants(self) -> list[Variant]:
        """Every variant in every size, side by side."""
        return [variant for side in self.sides for variant in side.sizes.values()]

    @cached_property
    def seed_std(self) -> SeedStd | None:
        """The standard deviation over seeds of the logarithm of the loss, pooled over sizes; None without two seeds."""
        return pooled_std([np.log(variant.final_losses) for variant in self.variants])

    @cached_property
    def document_losses_RP(self) -> Array | None:
        """Losses on resampled documents, the same documents for all points.

        None unless all runs have saved their losses on the same documents.
        """
        saved = [variant.document_losses for variant in self.variants]
        known = [each for each in saved if each is not None]
        if len(known) < len(saved) or len(known[0][0].tokens) < 2:
            return None
        documents = known[0][0]
        for other, _ in known:
            if not (np.array_equal(other.numbers, documents.numbers) and np.array_equal(other.tokens, documents.tokens)):
                return None
        nats_PD = np.stack([nats_SD.mean(axis=0) for _, nats_SD in known])
        tokens_R, nats_RP = resample_sums(documents.tokens.astype(np.float64), nats_PD, RESAMPLES)
        losses_RP: Array = nats_RP / tokens_R[:, None]
        return losses_RP

    @cached_property
    def _log_losses_RP(self) -> Array:
        seeds = [np.log(variant.final_losses) for variant in self.variants]
        resampled = self.document_losses_RP
        return resample_log_losses(seeds, resampled, RESAMPLES if resampled is None else len(resampled))

    def points(self, side: Side, axis: Axis) -> Points:
        """The measurements of a side."""
        start = sum(len(each.sizes) for each in self.sides[: self.sides.index(side)])
        rows = slice(start, start + len(side.sizes))
        variants = self.variants[rows]
        costs_P = np.log([variant.cost(axis)[-1] for variant in variants])
        losses_P = np.log([variant.val.loss[-1] for variant in variants])
        losses_RP = self._log_losses_RP[:, rows]
        costs_RP = np.tile(costs_P, (len(losses_RP), 1))
        if axis == "seconds":  # times vary like those of runs with equal work
            seconds = [np.log(variant.final_seconds) for variant in self.variants]
            costs_RP += seed_noise(seconds, seed=2, resamples=len(losses_RP))[:, rows]
        return Points(costs_P, losses_P, costs_RP, losses_RP)


def make_side(name: str, sizes: Mapping[str, Variant]) -> Side:
    """A side with its sizes in the order of their FLOPs.

    Raises:
        MoelmError: there are fewer than two sizes, or two of equal cost.
    """
    if len(sizes) < 2:
        raise MoelmError(f"{name} has only the size {', '.join(sizes)}; a ladder needs at least two sizes of each variant.")
    flops = {label: float(variant.cost("flops")[-1]) for label, variant in sizes.items()}
    ordered = sorted(sizes, key=flops.__getitem__)
    for a, b in pairwise(ordered):
        if flops[b] <= (1 + SAME_COST) * flops[a]:
            raise MoelmError(f"The sizes {a} and {b} of {name} cost the same FLOPs within 1%; different ones are expected.")
    return Side(name, {label: sizes[label] for label in ordered})


def resample_log_losses(log_losses: Sequence[Array], document_losses_RP: Array | None, resamples: int = RESAMPLES) -> Array:
    """`(R, P)`: logarithms of the points' losses, with other documents and other seeds.

    Args:
        log_losses: of each point's runs.
        document_losses_RP: losses on resampled documents; None if they are unknown.
        resamples: their number.
    """
    noise_RP = seed_noise(log_losses, seed=1, resamples=resamples)
    if document_losses_RP is not None:
        noise_RP += np.log(document_losses_RP)
        return noise_RP
    log_losses_RP: Array = noise_RP + np.array([np.log(np.exp(each).mean()) for each in log_losses])
    return log_losses_RP


def seed_noise(values: Sequence[Array], seed: int, resamples: int = RESAMPLES) -> Array:
    """`(R, P)`: deviations of the means over each point's runs, as other seeds would give; 0 if no point has two runs.

    All points have the same standard deviation, estimated from all of them. Few runs estimate it badly, so it is drawn
    anew for each resample, from its distribution given the estimate (scaled inverse chi-squared): the interval of a
    single point is then that of Student's t, where a plain bootstrap of three runs would be too narrow.

    Args:
        values: of each point's runs.
        seed: of the random numbers.
        resamples: their number.
    """
    shape, std = (resamples, len(values)), pooled_std(values)
    if std is None:
        return np.zeros(shape)
    rng = np.random.default_rng(seed)
    std_R1 = std.std * np.sqrt(std.degrees / rng.chisquare(std.degrees, (resamples, 1)))
    noise_RP: Array = std_R1 * rng.standard_normal(shape) / np.sqrt([len(each) for each in values])
    return noise_RP
