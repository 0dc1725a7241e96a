"""How sure differences are: evaluation documents drawn again and again, and the scatter between seeds.

Shapes: S seeds of one contestant, N runs of all, D documents, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5% for 1, 2, ... degrees of freedom."""


def student(degrees: int) -> float:
    """Student's t at 97.5%."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees


@dataclass(frozen=True)
class Interval:
    """The difference of two contestants' final losses, and where it lies with 95% confidence."""

    gain: float
    """Nats per token by which the first is better."""
    low: float
    high: float
    documents: int
    effective: float
    """As many documents of equal length would weigh as much: (sum of tokens)^2 / sum of tokens^2."""
    seeds: tuple[int, int]
    """Runs of either side."""
    scatter: bool
    """Whether the scatter between seeds is known, and in the interval."""
    better: float
    """Share of the documents that the first predicts better."""

    def doubt(self, gain: float) -> float:
        """How far towards 0 another gain of these two would reach, if it were as sure as this one; nats."""
        return self.gain - self.low if gain > 0 else self.high - self.gain

    @property
    def mirrored(self) -> "Interval":
        """The same, told from the other side."""
        return replace(
            self,
            gain=-self.gain,
            low=-self.high,
            high=-self.low,
            seeds=self.seeds[::-1],
            better=1 - self.better,
        )


@dataclass(frozen=True)
class Paired:
    """Two contestants on the same documents."""

    whole: Interval
    domains: dict[str, Interval]

    @property
    def mirrored(self) -> "Paired":
        """The same, told from the other side."""
        return Paired(self.whole.mirrored, {name: found.mirrored for name, found in self.domains.items()})


class Scatter(NamedTuple):
    """What seeds alone make of a loss."""

    deviation: float
    """Standard deviation of one run's loss, nats per token."""
    degrees: int
    """Degrees of freedom that it was estimated with."""

    def doubt(self, a: int, b: int) -> float:
        """Half of the 95% interval of a difference of means over so many runs."""
        return student(self.degrees) * self.deviation * math.sqrt(1 / a + 1 / b)


def scatter_of(losses: Sequence[Array], seeds: Sequence[tuple[int, ...]]) -> Scatter | None:
    """The scatter between seeds, pooled over contestants; None where no contestant has two.

    Where all have the same seeds, what a seed does to all of them alike (its batches) is taken out: the residual of a
    randomised block design, which for two contestants is the paired t-test.

    Args:
        losses: final losses of each contestant's runs.
    """
    if len(losses) > 1 and len(seeds[0]) > 1 and len(set(seeds)) == 1:
        table_CS = np.stack(losses)
        left = table_CS - table_CS.mean(axis=0) - table_CS.mean(axis=1, keepdims=True) + table_CS.mean()
        degrees = (len(table_CS) - 1) * (table_CS.shape[1] - 1)
        return Scatter(math.sqrt(float((left**2).sum()) / degrees), degrees)
    degrees = sum(len(each) - 1 for each in losses)
    if not degrees:
        return None
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in losses)
    return Scatter(math.sqrt(squares / degrees), degrees)


class _Part(NamedTuple):
    """Documents that are looked at together: all, or those of a domain."""

    tokens_D: Array
    nats_ND: Array
    tokens_R: Array
    """Sums over documents drawn with replacement."""
    nats_RN: Array
    scatter: Scatter | None


class Evidence:
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
        seeds = {each.name: each.seeds for each in contestants}
        tokens_D, nats_ND = documents.tokens.astype(np.float64), np.stack(rows)
        wanted: dict[str | None, Array] = {None: np.ones(len(tokens_D), dtype=bool)}
        wanted |= {name: documents.domains == number for number, name in enumerate(documents.names)}
        for name, chosen_D in wanted.items():
            if chosen_D.sum() > 1:
                self.parts[name] = self._part(tokens_D[chosen_D], nats_ND[:, chosen_D], seeds)

    def paired(self, a: Contestant, b: Contestant) -> Paired | None:
        """Their difference over all documents and over each domain; None where not both tell their documents."""
        if None not in self.parts or a.name not in self.places or b.name not in self.places:
            return None
        found = {name: self._interval(part, a, b) for name, part in self.parts.items()}
        return Paired(found[None], {name: interval for name, interval in found.items() if name is not None})

    def _part(self, tokens_D: Array, nats_ND: Array, seeds: Mapping[str, tuple[int, ...]]) -> _Part:
        losses_N = nats_ND.sum(axis=1) / tokens_D.sum()
        scatter = scatter_of([losses_N[place] for place in self.places.values()], [seeds[name] for name in self.places])
        return _Part(tokens_D, nats_ND, *draw(tokens_D, nats_ND), scatter)

    def _interval(self, part: _Part, a: Contestant, b: Contestant) -> Interval:
        mine, theirs = self.places[a.name], self.places[b.name]
        gain_D = part.nats_ND[theirs].mean(axis=0) - part.nats_ND[mine].mean(axis=0)
        gain = float(gain_D.sum() / part.tokens_D.sum())
        drawn_R = (part.nats_RN[:, theirs].mean(axis=1) - part.nats_RN[:, mine].mean(axis=1)) / part.tokens_R
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(drawn_R, [tail, 1 - tail])
        seeds = len(a.runs), len(b.runs)
        # Documents and seeds scatter independently of each other, so their doubts add up as squares.
        doubt = part.scatter.doubt(*seeds) if part.scatter is not None else 0.0
        return Interval(
            gain=gain,
            low=gain - math.hypot(gain - low, doubt),
            high=gain + math.hypot(high - gain, doubt),
            documents=len(gain_D),
            effective=float(part.tokens_D.sum() ** 2 / (part.tokens_D**2).sum()),
            seeds=seeds,
            scatter=part.scatter is not None,
            better=float((gain_D > 0).mean()),
        )


def draw(tokens_D: Array, nats_ND: Array, resamples: int = RESAMPLES) -> tuple[Array, Array]:
    """Sums of tokens `(R,)`, and of each run's nats `(R, N)`, over as many documents as there are, drawn with replacement
    (Efron 1979)."""
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
    return np.concatenate(tokens), np.concatenate(nats)
