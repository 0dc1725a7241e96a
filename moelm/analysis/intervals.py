"""How sure a difference is: the same evaluation documents, and the seeds, drawn again and again (Efron 1979).

Shapes: S seeds, D documents, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelm.analysis.contestants import Contestant
from moelm.analysis.runs import Array

LEVEL = 0.95
RESAMPLES = 10_000
DRAWS = 200_000_000
"""Most documents drawn in all; where there are very many, fewer resamples say as much."""
CHUNK = 4_000_000
"""Documents drawn at once, to bound the memory."""


@dataclass(frozen=True)
class Interval:
    """The difference of two contestants' final losses, and where it lies with 95% confidence."""

    gain: float
    """Nats per token by which the first is better."""
    low: float
    high: float
    documents: int
    seeds: int
    """The fewer of both sides."""
    better: float
    """Share of the documents that the first predicts better."""

    def doubt(self, gain: float) -> float:
        """How far towards 0 another gain of these two would reach, if it were as sure as this one; nats."""
        return self.gain - self.low if gain > 0 else self.high - self.gain


@dataclass(frozen=True)
class Paired:
    """Two contestants on the same documents."""

    whole: Interval
    domains: dict[str, Interval]


def paired(a: Contestant, b: Contestant) -> Paired | None:
    """Their difference over all documents and over each domain; None where not both tell their documents."""
    first, second = a.documents, b.documents
    if first is None or second is None:
        return None
    (documents, a_SD), (others, b_SD) = first, second
    if not (np.array_equal(documents.numbers, others.numbers) and np.array_equal(documents.tokens, others.tokens)):
        return None
    tokens_D = documents.tokens.astype(np.float64)

    def interval(wanted_D: Array) -> Interval:
        return bootstrap(a_SD[:, wanted_D], b_SD[:, wanted_D], tokens_D[wanted_D], a.seeds == b.seeds)

    domains = {
        name: interval(documents.domains == number)
        for number, name in enumerate(documents.names)
        if (documents.domains == number).sum() > 1
    }
    return Paired(interval(np.ones(len(tokens_D), dtype=bool)), domains)


def bootstrap(a_SD: Array, b_SD: Array, tokens_D: Array, same_seeds: bool, resamples: int = RESAMPLES) -> Interval:
    """Percentiles of the difference over documents drawn with replacement, and over seeds.

    Of S seeds S - 1 are drawn each time, which gives their mean the variance that it has (Rao and Wu 1988); one seed stays.

    Args:
        a_SD: nats of each document, a row for each seed of the first contestant.
        b_SD: the second contestant's.
        tokens_D: of each document.
        same_seeds: rows of both belong together, and are drawn together.
    """
    count = len(tokens_D)
    resamples = max(1000, min(resamples, DRAWS // count))
    rng = np.random.default_rng(0)
    drawn = []
    for size in _chunks(resamples, max(1, CHUNK // count)):
        weights_RD = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        a_RS = _seed_weights(len(a_SD), size, rng)
        b_RS = a_RS if same_seeds else _seed_weights(len(b_SD), size, rng)
        gained_R = ((b_RS @ b_SD - a_RS @ a_SD) * weights_RD).sum(axis=1)
        drawn.append(gained_R / (weights_RD @ tokens_D))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    gain_D = b_SD.mean(axis=0) - a_SD.mean(axis=0)
    return Interval(
        gain=float(gain_D.sum() / tokens_D.sum()),
        low=float(low),
        high=float(high),
        documents=count,
        seeds=min(len(a_SD), len(b_SD)),
        better=float((gain_D > 0).mean()),
    )


def _chunks(total: int, most: int) -> Sequence[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _seed_weights(seeds: int, size: int, rng: np.random.Generator) -> Array:
    """`(R, S)`: weight of each seed in each resample, 1 in all."""
    draws = max(1, seeds - 1)
    return rng.multinomial(draws, np.full(seeds, 1 / seeds), size=size) / draws
