"""Association between domains and experts, and how often an expert repeats, with what chance alone would give.

Pure functions of counts. Shapes: N documents, G domains, E experts, K choices per token.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def cramers_v(table_GE: NDArray[np.number]) -> float:
    """Cramér's V of a table of counts: 0 where rows do not differ, 1 where a column tells its row (Cramér 1946)."""
    table = np.asarray(table_GE, dtype=np.float64)
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    least = min(table.shape) - 1
    if least < 1:
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    chi_square = float(((table - expected) ** 2 / expected).sum())
    return float(np.sqrt(chi_square / (table.sum() * least)))


def mutual_information(table_GE: NDArray[np.number]) -> float:
    """Nats that an assignment's expert tells of its domain."""
    joint = np.asarray(table_GE, dtype=np.float64) / max(1, table_GE.sum())
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / independent[there])).sum())


def domain_table(counts_NE: Ints, domains_N: Ints, num_domains: int) -> Ints:
    """Assignments by domain, `(G, E)`."""
    table = np.zeros((num_domains, counts_NE.shape[1]), dtype=np.int64)
    np.add.at(table, domains_N, counts_NE)
    return table


def permutation_test(counts_NE: Ints, domains_N: Ints, permutations: int, rng: np.random.Generator) -> tuple[float, float]:
    """Chance of a Cramér's V as large as this one if documents had their domains by lot, and the mean V there.

    Tokens of one document are alike, so documents are what is shuffled. The observed labels count as one of the
    shuffles: the smallest value is 1 / (permutations + 1).
    """
    num_domains = int(domains_N.max()) + 1
    observed = cramers_v(domain_table(counts_NE, domains_N, num_domains))
    counts = counts_NE.astype(np.float64)
    shuffled = np.empty(permutations)
    for number in range(permutations):
        chosen_GN = np.equal.outer(np.arange(num_domains), rng.permutation(domains_N)).astype(np.float64)
        shuffled[number] = cramers_v(chosen_GN @ counts)
    as_large = int((shuffled >= observed * (1 - 1e-12)).sum())
    return (1 + as_large) / (1 + permutations), float(shuffled.mean())


def uniform_repetition(num_experts: int, top_k: int) -> tuple[float, float]:
    """Chances that two tokens share their first expert, and any expert, if experts were drawn evenly."""
    apart = comb(num_experts - top_k, top_k) / comb(num_experts, top_k)
    return 1 / num_experts, 1 - apart


def matched_first(shares_E: Floats) -> float:
    """Chance that two tokens share their first expert if each drew it on its own from the shares there are."""
    return float((shares_E**2).sum())


def matched_any(together_EE: Ints) -> float:
    """Chance that two tokens share an expert if each drew its pair on its own from the pairs there are (K = 2).

    Args:
        together_EE: tokens by the two experts that they visit; symmetric, with an empty diagonal.
    """
    pairs = np.triu(together_EE, 1) / np.triu(together_EE, 1).sum()
    visits_E = pairs.sum(axis=0) + pairs.sum(axis=1)
    # Two pairs meet in one expert or in both; counted by expert, those that meet in both are counted twice.
    return float((visits_E**2).sum() - (pairs**2).sum())
