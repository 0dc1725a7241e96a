"""Association and repetition: planted structure is found, chance is not, and closed forms equal enumeration."""

from itertools import combinations, product

import numpy as np
import pytest

from moelm.analyze.statistics import (
    cramers_v,
    domain_table,
    matched_any,
    matched_first,
    mutual_information,
    permutation_test,
    uniform_repetition,
)


def test_a_router_with_separate_experts_for_each_domain_has_effect_size_1_and_the_smallest_p() -> None:
    domains_N = np.arange(60) % 4
    counts_NE = np.zeros((60, 8), dtype=np.int64)
    for document, domain in enumerate(domains_N):
        counts_NE[document, 2 * domain : 2 * domain + 2] = 10 + document
    table_GE = domain_table(counts_NE, domains_N, 4)
    assert table_GE.sum() == counts_NE.sum()
    assert cramers_v(table_GE) == pytest.approx(1)
    shares = table_GE.sum(axis=1) / table_GE.sum()
    assert mutual_information(table_GE) == pytest.approx(-(shares * np.log(shares)).sum())
    p, permuted = permutation_test(counts_NE, domains_N, 199, np.random.default_rng(0))
    assert p == pytest.approx(1 / 200)
    assert 0.1 < permuted < 0.4


def test_without_structure_p_is_uniform() -> None:
    """Distance from uniform over 200 seeds is below the critical value of Kolmogorov's test at p 0.001."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        counts_NE = rng.multinomial(50, np.full(8, 1 / 8), size=40)
        found.append(permutation_test(counts_NE, rng.integers(0, 3, 40), 99, rng)[0])
    steps = np.arange(1, 201) / 200
    assert np.abs(np.sort(found) - steps).max() < 1.95 / np.sqrt(200) + 0.01  # p is a multiple of 0.01


def test_documents_are_permuted_not_tokens() -> None:
    """Four documents of a thousand tokens, each with an expert of its own: V is 1, and not significant."""
    counts_NE = np.diag([1000, 1000, 1000, 1000])
    assert cramers_v(domain_table(counts_NE, np.array([0, 0, 1, 1]), 2)) == pytest.approx(1)
    assert permutation_test(counts_NE, np.array([0, 0, 1, 1]), 99, np.random.default_rng(0)) == pytest.approx((1, 1))


@pytest.mark.parametrize("table", [[[3, 0, 5]], [[4], [9]], [[2, 2], [0, 0]], [[0, 0], [0, 0]], [[6, 3], [4, 2]]])
def test_tables_without_association(table: list[list[int]]) -> None:
    assert cramers_v(np.array(table)) == pytest.approx(0)
    assert mutual_information(np.array(table)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (8, 1), (5, 3), (4, 4)])
def test_uniform_repetition_equals_enumeration(num_experts: int, top_k: int) -> None:
    sets = list(combinations(range(num_experts), top_k))
    share = np.mean([bool(set(a) & set(b)) for a, b in product(sets, sets)])
    assert uniform_repetition(num_experts, top_k) == pytest.approx((1 / num_experts, share))


def test_published_chance_levels_of_mixtral() -> None:
    assert uniform_repetition(8, 2) == pytest.approx((0.125, 0.464), abs=5e-4)


def test_matched_repetition_equals_enumeration() -> None:
    rng = np.random.default_rng(0)
    pairs = list(combinations(range(6), 2))
    weights = rng.integers(0, 20, len(pairs))
    coactivation = np.zeros((6, 6), dtype=np.int64)
    for (a, b), weight in zip(pairs, weights, strict=True):
        coactivation[a, b] = coactivation[b, a] = weight
    chance = weights / weights.sum()
    share = sum(chance[i] * chance[j] for i, a in enumerate(pairs) for j, b in enumerate(pairs) if set(a) & set(b))
    assert matched_any(coactivation) == pytest.approx(share)
    shares = rng.dirichlet(np.ones(6))
    assert matched_first(shares) == pytest.approx(
        sum(p * q for i, p in enumerate(shares) for j, q in enumerate(shares) if i == j)
    )
