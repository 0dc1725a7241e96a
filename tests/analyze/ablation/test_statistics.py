"""Means, discoveries and rank correlations, against loops and planted truths."""

import numpy as np
import pytest
from scipy import stats

from moelm.analyze.ablation.statistics import discoveries, means_by_documents, rank_correlation


def test_intervals_of_means_cover_the_truth() -> None:
    """Documents of unequal lengths, whose means vary; the true mean over tokens is 0.3."""
    rng = np.random.default_rng(0)
    covered, small = [], []
    for _ in range(1000):
        tokens = rng.integers(5, 200, 40)
        sums = tokens * (0.3 + rng.normal(0, 0.2, 40)) + rng.normal(0, 1, 40) * np.sqrt(tokens)
        means = means_by_documents(np.stack([sums, sums - 0.3 * tokens]), tokens)
        covered.append(abs(means.mean[0] - 0.3) <= means.half_width[0])
        small.append(means.p[1] < 0.05)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)
    assert np.mean(small) == pytest.approx(0.05, abs=0.025)


def test_of_one_document_there_is_no_interval() -> None:
    means = means_by_documents(np.array([[6.0]]), np.array([3]))
    assert means.as_dict(0) == {"mean": 2.0, "low": None, "high": None}
    assert means.p.tolist() == [1.0]


def test_discoveries_are_those_of_benjamini_and_hochberg() -> None:
    """The largest i for which the i-th smallest of m p-values is at most 0.05 i / m, and all below it."""
    rng = np.random.default_rng(1)
    p = np.concatenate([rng.uniform(0, 1, 80), rng.uniform(0, 0.004, 20)]).reshape(2, 50)
    ordered = np.sort(p.ravel())
    threshold = max(value for i, value in enumerate(ordered, 1) if value <= 0.05 * i / len(ordered))
    found = discoveries(p)
    assert np.array_equal(found, p <= threshold)
    assert 5 < found.sum() < 40


def test_the_rank_correlation_is_that_of_scipy_and_its_interval_contains_it() -> None:
    rng = np.random.default_rng(2)
    tokens, domains = rng.integers(50, 100, 60), np.arange(60) % 3
    shares = rng.dirichlet(np.ones(4), 3)
    load = np.stack([rng.binomial(tokens, shares[domains, e]) for e in range(4)])
    effect = load * 0.1 + rng.normal(0, 3, load.shape)
    found = rank_correlation(load, effect, tokens, domains, [0, 1, 2], rng)
    assert found is not None
    by_domain = [[values[..., domains == g].sum(axis=-1) for g in range(3)] for values in (load, effect, tokens)]
    share = np.stack([each / each.sum() for each in by_domain[0]])
    per_token = np.stack([e / t for e, t in zip(by_domain[1], by_domain[2], strict=True)])
    assert found["spearman"] == pytest.approx(stats.spearmanr(share.ravel(), per_token.ravel()).statistic)
    assert found["low"] <= found["spearman"] <= found["high"]
    assert found["low"] > 0.3
    assert rank_correlation(load, 0.0 * effect, tokens, domains, [0, 1, 2], rng) is None
