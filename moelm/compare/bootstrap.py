"""Confidence intervals of loss differences: a paired bootstrap over evaluation documents, plus variation between seeds.

Shapes: S seeds of one variant, N runs in total, D documents, R resamples.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moelm.compare.variants import Variant
from moelm.runs.record import Array

CONFIDENCE = 0.95
RESAMPLES = 10_000
MAX_DRAWS = 50_000_000
"""Limit on resamples times documents; with very many documents, fewer resamples are as precise."""
CHUNK_DRAWS = 4_000_000
"""Documents drawn at a time, to bound the memory."""

_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5% for 1, 2, ... degrees of freedom."""


def student_t(degrees: int) -> float:
    """Student's t at 97.5%."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees


@dataclass(frozen=True)
class BootstrapInterval:
    """The difference of the final losses of two variants, with its 95% confidence interval; in nats per token."""

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

    def half_width(self, gain: float) -> float:
        """Half width, on the side toward 0, of an interval of this shape around another gain."""
        return self.gain - self.low if gain > 0 else self.high - self.gain

    def swap(self) -> "BootstrapInterval":
        """The same interval with first and second exchanged."""
        return replace(
            self,
            gain=-self.gain,
            low=-self.high,
            high=-self.low,
            better_documents=1 - self.better_documents,
            seeds=self.seeds[::-1],
        )


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two variants on the same documents."""

    overall: BootstrapInterval
    """On all documents."""
    domains: dict[str, BootstrapInterval]
    """On the documents of each domain."""


class SeedStd(NamedTuple):
    """An estimate of the standard deviation of a run's loss over seeds."""

    std: float
    """Nats per token."""
    degrees: int
    """Degrees of freedom of the estimate."""

    def half_width(self, runs_a: int, runs_b: int) -> float:
        """Half width of the 95% interval of the difference between means over so many runs."""
        return student_t(self.degrees) * self.std * math.sqrt(1 / runs_a + 1 / runs_b)


def pooled_seed_std(losses: Sequence[Array], seeds: Sequence[tuple[int, ...]]) -> SeedStd | None:
    """The standard deviation over seeds, pooled over variants; None if no variant has two runs.

    If all variants have the same seeds, the effect that a seed has on all of them (through the batches) is removed: the
    residual of a randomized block design, which for two variants is the paired t-test.

    Args:
        losses: final losses of each variant's runs.
        seeds: their seeds.
    """
    if len(losses) > 1 and len(seeds[0]) > 1 and len(set(seeds)) == 1:
        table_VS = np.stack(losses)
        residual_VS = table_VS - table_VS.mean(axis=0) - table_VS.mean(axis=1, keepdims=True) + table_VS.mean()
        degrees = (len(table_VS) - 1) * (table_VS.shape[1] - 1)
        return SeedStd(math.sqrt(float((residual_VS**2).sum()) / degrees), degrees)
    degrees = sum(len(each) - 1 for each in losses)
    if not degrees:
        return None
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in losses)
    return SeedStd(math.sqrt(squares / degrees), degrees)


def paired_differences(variants: Sequence[Variant]) -> dict[tuple[str, str], PairedDifference]:
    """The differences of all ordered pairs of variants that have losses on the same documents, by their names."""
    saved = [(variant, variant.document_losses) for variant in variants]
    known = [(variant, *losses) for variant, losses in saved if losses is not None]
    if not known:
        return {}
    documents = known[0][1]
    rows: dict[str, slice] = {}
    nats: list[Array] = []
    seeds: list[tuple[int, ...]] = []
    for variant, others, nats_SD in known:
        if np.array_equal(others.numbers, documents.numbers) and np.array_equal(others.tokens, documents.tokens):
            rows[variant.name] = slice(len(nats), len(nats) + len(nats_SD))
            nats += list(nats_SD)
            seeds.append(variant.seeds)
    tokens_D, nats_ND = documents.tokens.astype(np.float64), np.stack(nats)
    if len(tokens_D) < 2:
        return {}

    def intervals(mask_D: Array) -> dict[tuple[str, str], BootstrapInterval]:
        return _intervals(tokens_D[mask_D], nats_ND[:, mask_D], rows, seeds)

    overall = intervals(np.ones(len(tokens_D), dtype=bool))
    masks = {name: documents.domains == number for number, name in enumerate(documents.names)}
    domains = {name: intervals(mask_D) for name, mask_D in masks.items() if mask_D.sum() > 1}
    return {
        pair: PairedDifference(interval, {name: by_pair[pair] for name, by_pair in domains.items()})
        for pair, interval in overall.items()
    }


def _intervals(
    tokens_D: Array, nats_ND: Array, rows: Mapping[str, slice], seeds: Sequence[tuple[int, ...]]
) -> dict[tuple[str, str], BootstrapInterval]:
    """The intervals of all ordered pairs on one set of documents, from the same resamples.

    Args:
        rows: the rows of each variant's runs in `nats_ND`.
        seeds: the seeds of each variant's runs.
    """
    losses_N = nats_ND.sum(axis=1) / tokens_D.sum()
    seed_std = pooled_seed_std([losses_N[each] for each in rows.values()], seeds)
    tokens_R, nats_RN = resample_sums(tokens_D, nats_ND)
    tail = (1 - CONFIDENCE) / 2
    found: dict[tuple[str, str], BootstrapInterval] = {}
    for a, b in itertools.combinations(rows, 2):
        gain_D = nats_ND[rows[b]].mean(axis=0) - nats_ND[rows[a]].mean(axis=0)
        gain = float(gain_D.sum() / tokens_D.sum())
        gain_R = (nats_RN[:, rows[b]].mean(axis=1) - nats_RN[:, rows[a]].mean(axis=1)) / tokens_R
        low, high = np.quantile(gain_R, [tail, 1 - tail])
        runs = len(nats_ND[rows[a]]), len(nats_ND[rows[b]])
        # Documents and seeds vary independently, so the squares of the half widths add up.
        seed_half_width = seed_std.half_width(*runs) if seed_std is not None else 0.0
        interval = BootstrapInterval(
            gain=gain,
            low=gain - math.hypot(gain - low, seed_half_width),
            high=gain + math.hypot(high - gain, seed_half_width),
            documents=len(gain_D),
            effective_documents=float(tokens_D.sum() ** 2 / (tokens_D**2).sum()),
            better_documents=float((gain_D > 0).mean()),
            seeds=runs,
            seeds_included=seed_std is not None,
        )
        found |= {(a, b): interval, (b, a): interval.swap()}
    return found


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
