"""How sure differences are: the same evaluation documents, and the seeds, drawn again and again (Efron 1979).

Shapes: S seeds of one contestant, N runs of all, D documents, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moelm.analysis.contestants import Contestant
from moelm.analysis.runs import Array

LEVEL = 0.95
RESAMPLES = 10_000
DRAWS = 50_000_000
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


class Draws(NamedTuple):
    """Sums over documents drawn with replacement."""

    tokens_R: Array
    nats_RN: Array


class _Part(NamedTuple):
    """Documents that are looked at together: all, or those of a domain."""

    tokens_D: Array
    nats_ND: Array
    draws: Draws


class Resampled:
    """Contestants that tell their losses on the same documents, drawn once for all of their pairs."""

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        told = [(each, each.documents) for each in contestants]
        known = [(each, *found) for each, found in told if found is not None]
        self.places: dict[str, slice] = {}
        self.parts: dict[str | None, _Part] = {}
        if not known:
            return
        documents = known[0][1]
        rows: list[Array] = []
        for each, others, nats_SD in known:
            if np.array_equal(others.numbers, documents.numbers) and np.array_equal(others.tokens, documents.tokens):
                self.places[each.name] = slice(len(rows), len(rows) + len(nats_SD))
                rows += list(nats_SD)
        tokens_D, nats_ND = documents.tokens.astype(np.float64), np.stack(rows)
        wanted: dict[str | None, Array] = {None: np.ones(len(tokens_D), dtype=bool)}
        wanted |= {name: documents.domains == number for number, name in enumerate(documents.names)}
        for name, chosen_D in wanted.items():
            if chosen_D.sum() > 1:
                part = tokens_D[chosen_D], nats_ND[:, chosen_D]
                self.parts[name] = _Part(*part, draw(*part))

    def paired(self, a: Contestant, b: Contestant) -> Paired | None:
        """Their difference over all documents and over each domain; None where not both tell their documents."""
        if None not in self.parts or a.name not in self.places or b.name not in self.places:
            return None
        found = {name: self._interval(part, a, b) for name, part in self.parts.items()}
        return Paired(found[None], {name: interval for name, interval in found.items() if name is not None})

    def _interval(self, part: _Part, a: Contestant, b: Contestant) -> Interval:
        mine, theirs = self.places[a.name], self.places[b.name]
        low, high = bounds(part.draws, mine, theirs, a.seeds == b.seeds)
        gain_D = part.nats_ND[theirs].mean(axis=0) - part.nats_ND[mine].mean(axis=0)
        return Interval(
            gain=float(gain_D.sum() / part.tokens_D.sum()),
            low=low,
            high=high,
            documents=len(gain_D),
            seeds=min(len(a.runs), len(b.runs)),
            better=float((gain_D > 0).mean()),
        )


def draw(tokens_D: Array, nats_ND: Array, resamples: int = RESAMPLES) -> Draws:
    """Sums of tokens, and of each run's nats, over as many documents as there are, drawn with replacement."""
    count = len(tokens_D)
    resamples = max(1000, min(resamples, DRAWS // count))
    rng = np.random.default_rng(0)
    tokens, nats = [], []
    most = max(1, CHUNK // count)
    for start in range(0, resamples, most):
        size = min(most, resamples - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times_RD = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        tokens.append(times_RD @ tokens_D)
        nats.append(times_RD @ nats_ND.T)
    return Draws(np.concatenate(tokens), np.concatenate(nats))


def bounds(draws: Draws, a: slice, b: slice, same_seeds: bool) -> tuple[float, float]:
    """Between which the gain of one contestant on another lies in the middle 95% of resamples.

    Of S seeds S - 1 are drawn each time, which gives their mean the variance that it has (Rao and Wu 1988); one seed stays.

    Args:
        a, b: places of their runs.
        same_seeds: runs of both belong together, and are drawn together.
    """
    rng = np.random.default_rng(1)
    a_RS, b_RS = draws.nats_RN[:, a], draws.nats_RN[:, b]
    weights_RS = _seed_weights(a_RS.shape, rng)
    others_RS = weights_RS if same_seeds else _seed_weights(b_RS.shape, rng)
    gain_R = ((b_RS * others_RS).sum(axis=1) - (a_RS * weights_RS).sum(axis=1)) / draws.tokens_R
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(gain_R, [tail, 1 - tail])
    return float(low), float(high)


def _seed_weights(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """`(R, S)`: weight of each seed in each resample, 1 in all."""
    resamples, seeds = shape
    draws = max(1, seeds - 1)
    return rng.multinomial(draws, np.full(seeds, 1 / seeds), size=resamples) / draws
