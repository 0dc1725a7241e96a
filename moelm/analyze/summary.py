"""Statistics of each sparse layer as routing.json has them; docs/analysis.md documents the keys.

Shapes: G domains, L sparse layers, E experts, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moelm.analyze.collect import RoutingSample
from moelm.analyze.counts import UNIT, Ints, RoutingCounts
from moelm.analyze.layers import sparse_ffn
from moelm.analyze.statistics import (
    cramers_v,
    domain_table,
    matched_any,
    matched_first,
    mutual_information,
    permutation_test,
    uniform_repetition,
)
from moelm.model import Transformer
from moelm.model.moe.experts import Experts
from moelm.model.moe.layer import MoELayer
from moelm.runs.record import SYNTHETIC

SCHEMA = 2
MIN_COUNT = 20
"""Occurrences that a token needs to be listed in an expert's vocabulary."""
PART = 2**20
"""Weights that are converted to float64 at a time."""
LISTED_TOKENS = 10
"""Tokens listed in each expert's vocabulary."""

TokenText = Callable[[int], str]


def summarize(
    sample: RoutingSample, model: Transformer, token_text: TokenText, permutations: int, seed: int
) -> dict[str, Any]:
    """Statistics of a sample of routing.

    Args:
        model: the model that was sampled, for the similarity of its experts' weights.
        token_text: text of a token id.
        permutations: random permutations of the documents' domains for each p.
        seed: of the permutations.
    """
    counts, domains = sample.counts, sample.domains
    present = [g for g in range(len(domains)) if counts.tokens[g]]
    documents = np.bincount(sample.document_domains, minlength=len(domains))
    top_k = sparse_ffn(model.config).top_k
    similarity = _weight_similarity(model)
    rng = np.random.default_rng(seed)
    return {
        "schema": SCHEMA,
        "tokens": int(counts.tokens.sum()),
        "documents": len(sample.document_domains),
        "domains": {domains[g]: {"tokens": int(counts.tokens[g]), "documents": int(documents[g])} for g in present},
        "num_experts": counts.load.shape[1],
        "top_k": top_k,
        "permutations": permutations,
        "layers": [
            {
                "layer": number,
                **_load(counts.load[i]),
                "shares": _shares(sample, i, present),
                "association": _association(sample, i, present, permutations, rng),
                "repetition": _repetition(counts, i, present, domains, top_k),
                "entropy": _ratios(counts.entropy[:, i], counts.tokens, present, domains, UNIT),
                "entropy_max": math.log(counts.load.shape[1]),
                "margin": _ratios(counts.margin[:, i], counts.tokens, present, domains, UNIT),
                "coactivation": _coactivation(counts.coactivation[i]),
                "vocabulary_specialization": {
                    "by_input": _vocabulary(counts.by_input[i], top_k, token_text),
                    "by_prediction": _vocabulary(counts.by_prediction[i], top_k, token_text),
                },
                "weight_similarity": similarity[i],
            }
            for i, number in enumerate(sample.layers)
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


def _shares(sample: RoutingSample, i: int, present: Sequence[int]) -> dict[str, list[float]]:
    """Share of each domain's assignments by expert (Mixtral 2024, figure 7)."""
    table_GE = domain_table(sample.counts.document_load[:, i], sample.document_domains, len(sample.domains))
    return {sample.domains[g]: (table_GE[g] / table_GE[g].sum()).tolist() for g in present}


def _association(
    sample: RoutingSample, i: int, present: Sequence[int], permutations: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Association of experts with domains: with all domains, and with real and synthetic ones separately."""
    synthetic = {g for g in present if sample.domains[g].startswith(SYNTHETIC)}
    groups = {"all": set(present), "real": set(present) - synthetic, "synthetic": synthetic}
    results = {}
    for name, group in groups.items():
        if len(group) < 2 or (name != "all" and group == groups["all"]):
            continue
        in_group_N = np.isin(sample.document_domains, list(group))
        counts_NE, domains_N = sample.counts.document_load[in_group_N, i], sample.document_domains[in_group_N]
        table_GE = domain_table(counts_NE, domains_N, len(sample.domains))
        p, permuted = permutation_test(counts_NE, domains_N, permutations, rng)
        results[name] = {
            "cramers_v": cramers_v(table_GE),
            "permuted": permuted,
            "mutual_information": mutual_information(table_GE),
            "p": p,
        }
    return results


def _repetition(
    counts: RoutingCounts, i: int, present: Sequence[int], domains: Sequence[str], top_k: int
) -> dict[str, Any]:
    """How often adjacent tokens share their first expert, and any expert (Mixtral 2024, table 5), and chance levels."""
    first_E = counts.first_experts[:, i].sum(axis=0)
    matched = {"first": matched_first(first_E / max(1, first_E.sum()))}
    if top_k == 1:
        matched["any"] = matched["first"]
    elif top_k == 2:
        matched["any"] = matched_any(counts.coactivation[i])
    results = {}
    uniform = uniform_repetition(counts.load.shape[1], top_k)
    for kind, name in enumerate(("first", "any")):
        results[name] = {
            **_ratios(counts.adjacent_matches[:, i, kind], counts.adjacent_pairs, present, domains),
            "uniform": uniform[kind],
            "matched": matched.get(name),
            "shuffled": _ratio(counts.shuffled_matches[:, i, kind].sum(), counts.shuffled_pairs.sum()),
        }
    return results


def _coactivation(coactivation_EE: Ints) -> list[list[float]]:
    """Row e: of the tokens of expert e, the share that each other expert processes too."""
    total_E1 = np.maximum(1, coactivation_EE.sum(axis=1, keepdims=True))
    shares: list[list[float]] = (coactivation_EE / total_E1).tolist()
    return shares


def _vocabulary(by_token_EV: Ints, top_k: int, token_text: TokenText) -> list[list[dict[str, Any]]]:
    """For each expert, the tokens that are most often routed to it (OLMoE 2024, vocabulary specialization)."""
    count_V = by_token_EV.sum(axis=0) / top_k
    share_EV = np.divide(by_token_EV, count_V, out=np.zeros(by_token_EV.shape), where=count_V >= MIN_COUNT)
    return [
        [
            {"token": token, "text": token_text(token), "share": float(share_V[token]), "count": int(count_V[token])}
            for token in np.argsort(-share_V, kind="stable")[:LISTED_TOKENS].tolist()
            if share_V[token] > 0
        ]
        for share_V in share_EV
    ]


@torch.no_grad()
def _weight_similarity(model: Transformer) -> list[dict[str, Any]]:
    """Cosine similarities of each sparse layer's experts, all weights of an expert as one vector."""
    results = []
    for block in model.blocks:
        if not isinstance(block.ffn, MoELayer):
            continue
        with model.resident(block):
            cosine_EE = _cosines(block.ffn.experts)
        pairs = cosine_EE[~np.eye(len(cosine_EE), dtype=bool)]
        results.append(
            {
                "mean": float(pairs.mean()) if len(pairs) else None,
                "min": float(pairs.min()) if len(pairs) else None,
                "max": float(pairs.max()) if len(pairs) else None,
                "matrix": cosine_EE.tolist(),
            }
        )
    return results * (len(model.config.sparse_layers) // max(1, len(results)))  # layers that repeat share weights


def _cosines(experts: Experts) -> NDArray[np.float64]:
    """Cosine similarities of experts, `(E, E)`; a part of their weights at a time is in float64."""
    gram_EE = torch.zeros(len(experts.w1), len(experts.w1), dtype=torch.float64, device=experts.w1.device)
    for weight in (experts.w1, experts.w2, experts.w3):
        for part in torch.split(weight.flatten(1), max(1, PART // len(weight)), dim=1):
            part_double = part.double()
            gram_EE += part_double @ part_double.T
    norm_E = gram_EE.diagonal().sqrt()
    cosine_EE: NDArray[np.float64] = (gram_EE / norm_E[:, None] / norm_E).cpu().numpy()
    return cosine_EE


def _ratios(
    sums_G: Ints, totals_G: Ints, present: Sequence[int], domains: Sequence[str], unit: float = 1
) -> dict[str, Any]:
    """`sums_G * unit / totals_G` over all domains, and of each domain present."""
    return {
        "all": _ratio(sums_G.sum() * unit, totals_G.sum()),
        "domains": {domains[g]: _ratio(sums_G[g] * unit, totals_G[g]) for g in present},
    }


def _ratio(part: float, total: float) -> float | None:
    return float(part / total) if total else None
