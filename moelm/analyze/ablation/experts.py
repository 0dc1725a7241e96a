"""The loss without one expert: masked before the choice, or with an output of zero, by document; and the same done to as
many random assignments of the other experts in the same domain.

Shapes: N tokens, M tokens of a subset, E experts, K experts per token, L sparse layers, D documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelm.analyze.ablation.cached_pass import CachedPass, RouteChange, subset_of_routing
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.counts import Ints
from moelm.analyze.layers import sparse_ffn

DRAWS = 20
"""Random draws that each expert is compared with, at least: one or more in each batch."""
KINDS = ("mask", "zero")
"""Masked: the router selects without the expert, so that the next best takes its place. Zero: its output is zero."""


class ExpertSums(NamedTuple):
    """Sums of loss differences by document, times `1 / UNIT`."""

    ablated: Ints
    """`(kinds, L, E, D)`: without each expert, minus the unchanged model."""
    control: Ints
    """`(kinds, L, E, D)`: without as many random assignments to other experts, mean over draws."""
    draws: int
    """Random draws in the whole text."""


def ablate_experts(text: AblationText, seed: int, after_layer: Callable[[], None]) -> ExpertSums:
    """Ablate each expert of each layer by itself.

    Args:
        seed: of the random assignments.
        after_layer: called after each layer of a batch.
    """
    layers, num_experts = text.model.config.sparse_layers, sparse_ffn(text.model.config).num_experts
    draws = -(-DRAWS // len(text.batches))
    shape = (len(KINDS), len(layers), num_experts, len(text.documents))
    ablated, control = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    domain_D = torch.from_numpy(text.domains).to(text.device)
    for batch, cached in text.passes():
        generator = torch.Generator().manual_seed(seed + batch)
        domain_N = domain_D[text.document_of(cached)].masked_fill(~cached.batch.valid_N, -1)
        for index, layer in enumerate(layers):
            experts_NK = cached.layers[layer].routing.experts_NK
            for expert in range(num_experts):
                chosen_NK = (experts_NK == expert) & cached.batch.valid_N[:, None]
                others = [_random_others(chosen_NK, domain_N, generator) for _ in range(draws)]
                removed = [chosen_NK, *(other_NK for other_NK, _ in others)]
                changes = [change for each_NK in removed for change in _changes(cached, layer, each_NK)]
                for number, losses_N in enumerate(cached.losses_with(layer, changes)):
                    draw, kind = divmod(number, len(KINDS))
                    difference_N = losses_N - cached.losses_N
                    if draw == 0:
                        ablated[kind, index, expert] += text.by_document(difference_N, cached)
                    else:
                        scaled_N = difference_N * others[draw - 1][1] / draws
                        control[kind, index, expert] += text.by_document(scaled_N, cached)
            after_layer()
    ablated, control = (text.ranks.all_reduce_array(each, text.device) for each in (ablated, control))
    return ExpertSums(ablated, control, draws * len(text.batches))


def _changes(cached: CachedPass, layer: int, removed_NK: Tensor) -> list[RouteChange]:
    """The routing without some assignments, for each of `KINDS`."""
    tokens_M = removed_NK.any(dim=1).nonzero()[:, 0]
    removed_MK = removed_NK[tokens_M]
    routing = subset_of_routing(cached.layers[layer].routing, tokens_M)
    available_ME = torch.ones_like(routing.probs_NE, dtype=torch.bool).scatter(1, routing.experts_NK, ~removed_MK)
    masked = cached.reroute(layer, tokens_M, available_ME)
    zeroed = routing._replace(gates_NK=routing.gates_NK.masked_fill(removed_MK, 0))
    return [RouteChange(tokens_M, masked), RouteChange(tokens_M, zeroed)]


def _random_others(chosen_NK: Tensor, domain_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random assignments to other experts, in each domain as many first, second … choices as the chosen ones.

    If an expert has more than half of a domain's assignments, all of the others are taken.

    Args:
        domain_N: the domain of each token; -1 for padding.

    Returns:
        The assignments, and for each token how many times more assignments of its domain are chosen ones.
    """
    chosen_NK, domains_N = chosen_NK.cpu(), domain_N.cpu()
    random_NK, factor_N = torch.zeros_like(chosen_NK), torch.zeros(len(domains_N), dtype=torch.float64)
    for domain in sorted(set(domains_N[chosen_NK.any(dim=1)].tolist())):
        in_domain_N = domains_N == domain
        for k, count in enumerate(chosen_NK[in_domain_N].sum(dim=0).tolist()):
            others_M = (in_domain_N & ~chosen_NK[:, k]).nonzero()[:, 0]
            random_NK[others_M[torch.randperm(len(others_M), generator=generator)[:count]], k] = True
        wanted, found = (int(each_NK[in_domain_N].sum()) for each_NK in (chosen_NK, random_NK))
        factor_N[in_domain_N] = wanted / max(1, found)
    return random_NK.to(domain_N.device), factor_N.to(domain_N.device)
