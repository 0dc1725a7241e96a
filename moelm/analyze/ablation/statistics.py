"""Means over tokens with intervals by documents, effects under a false-discovery rate, and rank correlations.

The tokens of a document are not independent, so documents are what is sampled.

Shapes: C cells, D documents, E experts, G domains, R resamples.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moelm.analyze.counts import Ints

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
DISCOVERY_RATE = 0.05
"""Expected share of false ones among the effects that are reported (Benjamini and Hochberg 1995)."""
RESAMPLES = 500
"""Bootstrap resamples of documents for the interval of a rank correlation."""
LARGEST = 0.9999
"""Correlation whose Fisher's z is used for larger ones."""


class Means(NamedTuple):
    """Means over tokens of several quantities, `(C,)` each."""

    mean: Floats
    half_width: Floats
    """Of the 95% confidence interval; not a number with fewer than two documents."""
    p: Floats
    """Two-sided, of a mean of zero; 1 with fewer than two documents."""

    def as_dict(self, index: int) -> dict[str, Any]:
        """One mean with its interval, for JSON."""
        mean, half_width = float(self.mean[index]), float(self.half_width[index])
        known = bool(np.isfinite(half_width))
        return {"mean": mean, "low": mean - half_width if known else None, "high": mean + half_width if known else None}


def means_by_documents(sums_CD: NDArray[np.floating[Any]], tokens_D: Ints) -> Means:
    """Ratios of sums over documents to their tokens, with intervals from Student's t.

    The standard error is that of a ratio of two sums over a random sample of documents (Cochran 1977, section 2.11).
    """
    count, total = len(tokens_D), max(1, int(tokens_D.sum()))
    mean_C: Floats = sums_CD.sum(axis=1) / total
    if count < 2:
        return Means(mean_C, np.full(len(mean_C), np.nan), np.ones(len(mean_C)))
    residuals_CD = sums_CD - mean_C[:, None] * tokens_D
    error_C: Floats = np.sqrt((residuals_CD**2).sum(axis=1) * count / (count - 1)) / total
    t_C = np.divide(mean_C, error_C, out=np.zeros_like(mean_C), where=error_C > 0)
    p_C: Floats = 2 * stats.t.sf(np.abs(t_C), count - 1)
    return Means(mean_C, error_C * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1), p_C)


def discoveries(p: Floats) -> NDArray[np.bool_]:
    """Which of many tests are effects, at a false-discovery rate of `DISCOVERY_RATE`; of any shape."""
    adjusted = stats.false_discovery_control(p.ravel(), method="bh")
    found: NDArray[np.bool_] = (adjusted <= DISCOVERY_RATE).reshape(p.shape)
    return found


def sums_by_domain(values_XD: NDArray[Any], domains_D: Ints, present: list[int]) -> NDArray[Any]:
    """Sums over the documents of each domain, `(X, G)`."""
    member_DG = domains_D[:, None] == np.array(present)
    sums: NDArray[Any] = values_XD @ member_DG
    return sums


def rank_correlation(
    load_ED: Ints, effect_ED: Floats, tokens_D: Ints, domains_D: Ints, present: list[int], rng: np.random.Generator
) -> dict[str, Any] | None:
    """Spearman's correlation, over experts and domains, of a domain's share of assignments with the effect on its loss.

    Args:
        load_ED: assignments of each expert by document.
        effect_ED: sums of the effect of each expert's ablation by document.

    Returns:
        The correlation with an interval; None if shares or effects are all equal. The interval is symmetric in Fisher's z,
        whose standard error is that of bootstrap resamples of the documents: their own quantiles would be too low, because
        a resample has more noise than the sample.
    """

    def correlation(documents: Ints) -> float:
        parts = [
            sums_by_domain(values[..., documents], domains_D[documents], present)
            for values in (load_ED, effect_ED, tokens_D[None])
        ]
        load_EG, effect_EG, tokens_1G = parts
        seen = tokens_1G[0] > 0
        share_EG = load_EG[:, seen] / np.maximum(1, load_EG[:, seen].sum(axis=0))
        ranks = [stats.rankdata(values) for values in (share_EG.ravel(), (effect_EG[:, seen] / tokens_1G[:, seen]).ravel())]
        return float(np.corrcoef(ranks)[0, 1]) if all(each.std() for each in ranks) else math.nan

    everything = np.arange(len(tokens_D))
    observed = correlation(everything)
    if not np.isfinite(observed):
        return None
    resampled = np.array([correlation(rng.choice(everything, len(everything))) for _ in range(RESAMPLES)])
    center, *others = np.arctanh(np.clip([observed, *resampled[np.isfinite(resampled)]], -LARGEST, LARGEST))
    half_width = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.std(others)
    return {
        "spearman": observed,
        "low": float(np.tanh(center - half_width)),
        "high": float(np.tanh(center + half_width)),
    }
