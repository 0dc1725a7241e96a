"""Confidence intervals of loss differences: a paired bootstrap over evaluation documents, plus variation between seeds.

Shapes: S seeds of one variant, N runs in total, D documents, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelm.compare.reading import Reading
from moelm.compare.seed_std import SeedStd, pooled_seed_std
from moelm.compare.variants import Variant
from moelm.data.effective_documents import effective_documents
from moelm.runs.record import Array

CONFIDENCE = 0.95
RESAMPLES = 10_000
MAX_DRAWS = 50_000_000
"""Limit on resamples times documents; with very many documents, fewer resamples are as precise."""
CHUNK_DRAWS = 4_000_000
"""Documents drawn at a time, to bound the memory."""


@dataclass(frozen=True)
class BootstrapInterval:
    """The difference of the losses of two variants, with its 95% confidence interval; in nats per token."""

    gain: float
    """Loss of the second minus loss of the first: positive where the first is better."""
    low: float
    high: float
    documents: int
    effective_documents: float
    """Number of documents of equal length with the same weight: (sum of tokens)^2 / sum of tokens^2."""
    better_documents: float
    """Share of the documents on which the first has the lower loss."""
    seeds: tuple[int, int]
    """Number of runs of each variant."""
    seeds_included: bool
    """Whether the interval includes the variation between seeds, or documents only."""
    seeds_to_decide: int | None
    """If 0 is in the interval: the number of seeds of each at which it would not be, for a difference of this size; None if
    `MAX_SEEDS` would not do, and otherwise."""
    seeds_from: str | None = None
    """The report from which the variation between seeds was taken; None if it is that of these runs."""

    @property
    def undecided(self) -> bool:
        """Whether 0 is in it."""
        return self.low <= 0 <= self.high

    def half_width(self, gain: float) -> float:
        """Half width, on the side toward 0, of an interval of this shape around another gain."""
        return self.gain - self.low if gain > 0 else self.high - self.gain


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two variants on the same documents."""

    overall: BootstrapInterval
    """On all documents."""
    domains: dict[str, BootstrapInterval]
    """On the documents of each domain."""


class PairedBootstrap:
    """Paired differences of variants on the documents that they share, all from the same resamples.

    Variants that have not saved their losses on the documents of the first one that has are left out.

    Args:
        seed_std: the variation between seeds where no variant has two runs.
    """

    def __init__(self, variants: Sequence[Variant], seed_std: SeedStd | None = None) -> None:
        self._other_seed_std = seed_std
        saved = [(variant, i, length.document_losses) for variant in variants for i, length in enumerate(variant.lengths)]
        known = [(variant, i, *losses) for variant, i, losses in saved if losses is not None]
        self._rows: dict[tuple[str, int], slice] = {}
        """The runs of each length of a variant, by its name and the index of the length."""
        nats: list[Array] = []
        for variant, i, others, nats_SD in known:
            documents = known[0][2]
            if np.array_equal(others.numbers, documents.numbers) and np.array_equal(others.tokens, documents.tokens):
                self._rows[variant.name, i] = slice(len(nats), len(nats) + len(nats_SD))
                nats += list(nats_SD)
        self._variants = [variant for variant in variants if (variant.name, len(variant.shorter)) in self._rows]
        self._samples: dict[str | None, _Sample] = {}
        if not self._variants or len(known[0][2].tokens) < 2:
            return
        documents = known[0][2]
        masks: dict[str | None, Array] = {None: np.ones(len(documents.tokens), dtype=bool)}
        masks |= {name: documents.domains == number for number, name in enumerate(documents.names)}
        for name, mask_D in masks.items():
            if mask_D.sum() > 1:
                self._samples[name] = _Sample(documents.tokens[mask_D].astype(np.float64), np.stack(nats)[:, mask_D])

    def difference(self, a: Variant, b: Variant) -> PairedDifference | None:
        """The difference of the final losses; None unless both are known on at least two shared documents."""
        if (overall := self._interval(None, a, _final(a), b, _final(b))) is None:
            return None
        by_domain = {name: self._interval(name, a, _final(a), b, _final(b)) for name in self._samples if name is not None}
        return PairedDifference(overall, {name: each for name, each in by_domain.items() if each is not None})

    def interval(self, a: Variant, reading_a: Reading, b: Variant, reading_b: Reading) -> BootstrapInterval | None:
        """The difference of two readings of final losses; None for others."""
        if reading_a.weights is None or reading_b.weights is None:
            return None
        return self._interval(None, a, reading_a.weights, b, reading_b.weights)

    def _interval(
        self, name: str | None, a: Variant, weights_a: Sequence[float], b: Variant, weights_b: Sequence[float]
    ) -> BootstrapInterval | None:
        """The interval on the documents of a domain, or on all of them.

        Args:
            weights_a: of the lengths of `a`.
        """
        if not self._samples or a not in self._variants or b not in self._variants:
            return None
        sample = self._samples[name]
        mix_a, mix_b = self._mix(a, weights_a), self._mix(b, weights_b)
        if mix_a is None or mix_b is None:
            return None
        # The other variants, at their ends, take part in the standard deviation over seeds.
        mixes = {variant.name: self._mix(variant, _final(variant)) for variant in self._variants}
        mixes |= {a.name: mix_a, b.name: mix_b}
        losses = [sample.losses(mix) for mix in mixes.values() if mix is not None]
        seed_std = pooled_seed_std(losses, [each.seeds for each in self._variants])
        return sample.interval(mix_a, mix_b, seed_std or self._other_seed_std)

    def _mix(self, variant: Variant, weights: Sequence[float]) -> Array | None:
        """`(S, N)`: the weight of every run in the readings of a variant; None if a run's losses are unknown."""
        mix_SN = np.zeros((len(variant.runs), max(rows.stop for rows in self._rows.values())))
        for i, weight in enumerate(weights):
            if weight and (variant.name, i) not in self._rows:
                return None
            if weight:
                mix_SN[:, self._rows[variant.name, i]] = weight * np.eye(len(mix_SN))
        return mix_SN


def _final(variant: Variant) -> tuple[float, ...]:
    """The weights of a variant's lengths in its final losses."""
    return (*(0.0 for _ in variant.shorter), 1.0)


class _Sample:
    """All runs' losses on one set of documents, and their sums over the resamples."""

    def __init__(self, tokens_D: Array, nats_ND: Array) -> None:
        self.tokens_D, self.nats_ND = tokens_D, nats_ND
        self.tokens_R, self.nats_RN = resample_sums(tokens_D, nats_ND)

    def losses(self, mix_SN: Array) -> Array:
        """`(S,)`: the losses of readings."""
        losses: Array = mix_SN @ self.nats_ND.sum(axis=1) / self.tokens_D.sum()
        return losses

    def interval(self, a_SN: Array, b_SN: Array, seed_std: SeedStd | None) -> BootstrapInterval:
        """The interval of the difference of two readings."""
        difference_N = b_SN.mean(axis=0) - a_SN.mean(axis=0)
        gain_D = difference_N @ self.nats_ND
        gain = float(gain_D.sum() / self.tokens_D.sum())
        gain_R = self.nats_RN @ difference_N / self.tokens_R
        # Both from the lower tail, so that the other order of the pair gives the same numbers with the other sign.
        low, high = (sign * float(np.quantile(sign * gain_R, (1 - CONFIDENCE) / 2)) for sign in (1, -1))
        # Documents and seeds vary independently, so the squares of the half widths add up.
        seed_half_width = seed_std.half_width(len(a_SN), len(b_SN)) if seed_std is not None else 0.0
        document_half_width = gain - low if gain > 0 else high - gain  # on the side of 0
        low, high = gain - math.hypot(gain - low, seed_half_width), gain + math.hypot(high - gain, seed_half_width)
        return BootstrapInterval(
            gain=gain,
            low=low,
            high=high,
            seeds_to_decide=seed_std.seeds_to_decide(gain, document_half_width) if seed_std and low <= 0 <= high else None,
            documents=len(gain_D),
            effective_documents=effective_documents(self.tokens_D.tolist()),
            better_documents=float((gain_D > 0).mean()),
            seeds=(len(a_SN), len(b_SN)),
            seeds_included=seed_std is not None,
            seeds_from=None if seed_std is None else seed_std.source,
        )


def resample_sums(tokens_D: Array, nats_ND: Array, resamples: int = RESAMPLES) -> tuple[Array, Array]:
    """Sums over bootstrap resamples: each draws as many documents as there are, with replacement (Efron 1979).

    Args:
        resamples: their number; reduced, to at least 1,000, if there are very many documents.

    Returns:
        Tokens `(R,)`, and nats of each run `(R, N)`.
    """
    count = len(tokens_D)
    resamples = max(1000, min(resamples, MAX_DRAWS // count))
    rng = np.random.default_rng(0)
    tokens, nats = [], []
    chunk = max(1, CHUNK_DRAWS // count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times_RD = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        tokens.append(times_RD @ tokens_D)
        nats.append(times_RD @ nats_ND.T)
    return np.concatenate(tokens), np.concatenate(nats)
