"""From counts to routing.json: shares, association, repetition, entropy, company, vocabulary, weights.

The keys are documented in docs/analysis.md and do not change their meaning.

Shapes: G domains, L sparse layers, E experts, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moelm.analysis.routing.collect import Sample
from moelm.analysis.routing.counts import UNIT, Ints, RoutingCounts
from moelm.analysis.routing.statistics import (
    cramers_v,
    domain_table,
    matched_any,
    matched_first,
    mutual_information,
    permutation_test,
    uniform_repetition,
)
from moelm.analysis.runs import SYNTHETIC

SCHEMA = 1
SEEN = 20
"""Occurrences below which a token is not called characteristic."""
LISTED = 10
"""Characteristic tokens told of each expert."""

Words = Callable[[int], str]


def summarise(
    sample: Sample, top_k: int, words: Words, similarity: Sequence[Any], permutations: int, seed: int
) -> dict[str, Any]:
    """Everything that routing.json tells.

    Args:
        words: text of a token.
        similarity: cosines between experts, of each sparse layer.
        permutations: shuffles of the documents' domains behind each p.
    """
    counts, domains = sample.counts, sample.domains
    there = [g for g in range(len(domains)) if counts.tokens[g]]
    documents = np.bincount(sample.document_domains, minlength=len(domains))
    rng = np.random.default_rng(seed)
    return {
        "schema": SCHEMA,
        "tokens": int(counts.tokens.sum()),
        "documents": len(sample.document_domains),
        "domains": {domains[g]: {"tokens": int(counts.tokens[g]), "documents": int(documents[g])} for g in there},
        "num_experts": counts.load.shape[1],
        "top_k": top_k,
        "permutations": permutations,
        "layers": [
            {
                "layer": number,
                **_load(counts.load[at]),
                "shares": _shares(sample, at, there),
                "association": _association(sample, at, there, permutations, rng),
                "repetition": _repetition(counts, at, there, domains, top_k),
                **_certainty(counts, at, there, domains),
                "together": _together(counts.together[at]),
                "characteristic": {
                    "by_input": characteristic(counts.by_input[at], top_k, words),
                    "by_prediction": characteristic(counts.by_prediction[at], top_k, words),
                },
                "similarity": _similarity(np.asarray(similarity[at])),
            }
            for at, number in enumerate(sample.layers)
        ],
    }


def _load(load_E: Ints) -> dict[str, Any]:
    share_E = load_E / max(1, load_E.sum())
    mean = 1 / len(load_E)
    return {
        "load": share_E.tolist(),
        "load_max_over_mean": float(share_E.max() / mean),
        "load_cv": float(share_E.std() / mean),
        "dead_experts": np.flatnonzero(load_E == 0).tolist(),
    }


def _shares(sample: Sample, at: int, there: Sequence[int]) -> dict[str, list[float]]:
    """Share of each domain's assignments that goes to each expert (Mixtral 2024, figure 7)."""
    table_GE = domain_table(sample.counts.documents[:, at], sample.document_domains, len(sample.domains))
    return {sample.domains[g]: (table_GE[g] / table_GE[g].sum()).tolist() for g in there}


def _association(
    sample: Sample, at: int, there: Sequence[int], permutations: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Whether experts tell domains apart: over all domains, over real and over generated ones."""
    synthetic = {g for g in there if sample.domains[g].startswith(SYNTHETIC)}
    groups = {"all": set(there), "real": set(there) - synthetic, "synthetic": synthetic}
    found = {}
    for name, group in groups.items():
        if len(group) < 2 or (name != "all" and group == groups["all"]):
            continue
        wanted_N = np.isin(sample.document_domains, list(group))
        counts_NE, domains_N = sample.counts.documents[wanted_N, at], sample.document_domains[wanted_N]
        table_GE = domain_table(counts_NE, domains_N, len(sample.domains))
        p, shuffled = permutation_test(counts_NE, domains_N, permutations, rng)
        found[name] = {
            "cramers_v": cramers_v(table_GE),
            "shuffled": shuffled,
            "mutual_information": mutual_information(table_GE),
            "p": p,
        }
    return found


def _repetition(counts: RoutingCounts, at: int, there: Sequence[int], domains: Sequence[str], top_k: int) -> dict[str, Any]:
    """How often neighbours share their first expert, and any (Mixtral 2024, table 5), beside what chance would give."""
    experts = counts.load.shape[1]
    first_E = counts.first[:, at].sum(axis=0)
    matched = {"first": matched_first(first_E / max(1, first_E.sum()))}
    if top_k == 1:
        matched["any"] = matched["first"]
    elif top_k == 2:
        matched["any"] = matched_any(counts.together[at])
    told = {}
    for kind, (name, uniform) in enumerate(zip(("first", "any"), uniform_repetition(experts, top_k), strict=True)):
        repeated_G, shuffled_G = counts.repeated[:, at, kind], counts.shuffled[:, at, kind]
        told[name] = {
            "all": _ratio(repeated_G.sum(), counts.neighbours.sum()),
            "domains": {domains[g]: _ratio(repeated_G[g], counts.neighbours[g]) for g in there},
            "uniform": uniform,
            "matched": matched.get(name),
            "shuffled": _ratio(shuffled_G.sum(), counts.shuffled_pairs.sum()),
        }
    return told


def _certainty(counts: RoutingCounts, at: int, there: Sequence[int], domains: Sequence[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"entropy_max": math.log(counts.load.shape[1])}
    for name, sums_G in (("entropy", counts.entropy[:, at]), ("margin", counts.margin[:, at])):
        told[name] = {
            "all": _ratio(sums_G.sum() * UNIT, counts.tokens.sum()),
            "domains": {domains[g]: _ratio(sums_G[g] * UNIT, counts.tokens[g]) for g in there},
        }
    return told


def _together(together_EE: Ints) -> list[list[float]]:
    """Row e: of the tokens that visit expert e, the part that each other expert sees too."""
    total_E1 = np.maximum(1, together_EE.sum(axis=1, keepdims=True))
    shares: list[list[float]] = (together_EE / total_E1).tolist()
    return shares


def characteristic(by_token_EV: Ints, top_k: int, words: Words) -> list[list[dict[str, Any]]]:
    """Tokens of which the largest part visits an expert (OLMoE 2024, vocabulary specialization), for each expert."""
    seen_V = by_token_EV.sum(axis=0) / top_k
    enough_V = seen_V >= SEEN
    share_EV = np.divide(by_token_EV, seen_V, out=np.zeros(by_token_EV.shape), where=enough_V)
    found = []
    for share_V in share_EV:
        best = np.argsort(-share_V, kind="stable")[:LISTED]
        found.append(
            [
                {"token": int(token), "text": words(int(token)), "share": float(share_V[token]), "seen": int(seen_V[token])}
                for token in best
                if share_V[token] > 0
            ]
        )
    return found


def _similarity(cosine_EE: NDArray[np.float64]) -> dict[str, Any]:
    apart = cosine_EE[~np.eye(len(cosine_EE), dtype=bool)]
    known = len(apart) > 0
    return {
        "mean": float(apart.mean()) if known else None,
        "min": float(apart.min()) if known else None,
        "max": float(apart.max()) if known else None,
        "matrix": cosine_EE.tolist(),
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
