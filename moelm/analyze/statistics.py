"""Association between domains and experts, and repetition of experts between tokens, with their chance levels.

Pure functions of counts. Shapes: N documents, G domains, E experts.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

from moelm.analyze.counts import Ints


def cramers_v(table_GE: NDArray[np.number]) -> float:
    """Cramér's V of a contingency table (Cramér 1946): 0 for rows with equal shares, 1 if the column determines the row."""
    table = np.asarray(table_GE, dtype=np.float64)
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    degrees = min(table.shape) - 1
    if degrees < 1:
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    chi_square = float(((table - expected) ** 2 / expected).sum())
    return float(np.sqrt(chi_square / (table.sum() * degrees)))


def mutual_information(table_GE: NDArray[np.number]) -> float:
    """Mutual information of the domain and the expert of an assignment, in nats."""
    joint = np.asarray(table_GE, dtype=np.float64) / max(1, table_GE.sum())
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    positive = joint > 0
    return float((joint[positive] * np.log(joint[positive] / independent[positive])).sum())


def domain_table(counts_NE: Ints, domains_N: Ints, num_domains: int) -> Ints:
    """Assignments by domain, `(G, E)`."""
    table = np.zeros((num_domains, counts_NE.shape[1]), dtype=np.int64)
    np.add.at(table, domains_N, counts_NE)
    return table


def permutation_test(counts_NE: Ints, domains_N: Ints, permutations: int, rng: np.random.Generator) -> tuple[float, float]:
    """Test Cramér's V of domains and experts against random permutations of the documents' domains.

    Tokens of one document are not independent, so documents are permuted. The observed labels count as one of the
    permutations, so the smallest possible p is 1 / (permutations + 1).

    Returns:
        p, and the mean V of the permutations.
    """
    num_domains = int(domains_N.max()) + 1
    observed = cramers_v(domain_table(counts_NE, domains_N, num_domains))
    counts = counts_NE.astype(np.float64)
    permuted = np.empty(permutations)
    for number in range(permutations):
        chosen_GN = np.equal.outer(np.arange(num_domains), rng.permutation(domains_N)).astype(np.float64)
        permuted[number] = cramers_v(chosen_GN @ counts)
    as_large = int((permuted >= observed * (1 - 1e-12)).sum())
    return (1 + as_large) / (1 + permutations), float(permuted.mean())


def uniform_repetition(num_experts: int, top_k: int) -> tuple[float, float]:
    """Probabilities that two tokens share their first expert, and any expert, if experts are uniformly random."""
    disjoint = comb(num_experts - top_k, top_k) / comb(num_experts, top_k)
    return 1 / num_experts, 1 - disjoint


def matched_first(shares_E: NDArray[np.float64]) -> float:
    """Probability that two independent tokens share their first expert, given the shares of first experts."""
    return float((shares_E**2).sum())


def matched_any(coactivation_EE: Ints) -> float:
    """Probability that two independent tokens share an expert, given how often each pair of experts occurs (top-2 routing).

    Args:
        coactivation_EE: tokens by their two experts; symmetric, with zeros on the diagonal.
    """
    pairs = np.triu(coactivation_EE, 1) / np.triu(coactivation_EE, 1).sum()
    tokens_E = pairs.sum(axis=0) + pairs.sum(axis=1)
    # Two pairs share one expert or both. The sum over experts counts those that share both twice.
    return float((tokens_E**2).sum() - (pairs**2).sum())
