"""The loss without one expert: masked before the choice, or with an output of zero, by document; and the same done to as
many random assignments.

Shapes: N tokens, M tokens of a subset, E experts, K experts per token, L sparse layers, D documents.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelm.analyze.ablation.cached_pass import CachedPass, RouteChange, subset_of_routing
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.counts import Ints
from moelm.analyze.layers import sparse_ffn

DRAWS = 20
"""Random draws that each expert is compared with, in the whole text: at least one in each batch."""
KINDS = ("mask", "zero")
"""Masked: the router selects without the expert, so that the next best takes its place. Zero: its output is zero."""


class ExpertSums(NamedTuple):
    """Sums of loss differences by document, times `1 / UNIT`."""

    ablated: Ints
    """`(kinds, L, E, D)`: without each expert, minus the unchanged model."""
    control: Ints
    """`(kinds, L, E, D)`: without as many random assignments, minus the unchanged model; mean over the draws."""


def ablate_experts(text: AblationText, seed: int, after_layer: Callable[[], None]) -> ExpertSums:
    """Ablate each expert of each layer by itself.

    Args:
        seed: of the random assignments.
        after_layer: called after each layer of a batch.
    """
    layers, num_experts = text.model.config.sparse_layers, sparse_ffn(text.model.config).num_experts
    draws = -(-DRAWS // len(text.batches))
    shape = (len(KINDS), len(layers), num_experts, len(text.documents))
    sums = ExpertSums(np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64))
    for batch, cached in text.passes():
        generator = torch.Generator().manual_seed(seed + batch)
        for index, layer in enumerate(layers):
            routing = cached.layers[layer].routing
            for expert in range(num_experts):
                chosen_NK = (routing.experts_NK == expert) & cached.batch.valid_N[:, None]
                removed = [chosen_NK, *_random_assignments(chosen_NK, cached.batch.valid_N, draws, generator)]
                changes = [change for each_NK in removed for change in _changes(cached, layer, each_NK)]
                for number, losses_N in enumerate(cached.losses_with(layer, changes)):
                    draw, kind = divmod(number, len(KINDS))
                    difference_D = text.by_document(losses_N - cached.losses_N, cached)
                    if draw == 0:
                        sums.ablated[kind, index, expert] += difference_D
                    else:
                        sums.control[kind, index, expert] += difference_D // draws
            after_layer()
    return ExpertSums(*(text.ranks.all_reduce_array(each, text.device) for each in sums))


def _changes(cached: CachedPass, layer: int, removed_NK: Tensor) -> list[RouteChange]:
    """The routing without some assignments, for each of `KINDS`."""
    tokens_M = removed_NK.any(dim=1).nonzero()[:, 0]
    removed_MK = removed_NK[tokens_M]
    routing = subset_of_routing(cached.layers[layer].routing, tokens_M)
    available_ME = torch.ones_like(routing.probs_NE, dtype=torch.bool).scatter(1, routing.experts_NK, ~removed_MK)
    masked = cached.reroute(layer, tokens_M, available_ME)
    zeroed = routing._replace(gates_NK=routing.gates_NK.masked_fill(removed_MK, 0))
    return [RouteChange(tokens_M, masked), RouteChange(tokens_M, zeroed)]


def _random_assignments(chosen_NK: Tensor, valid_N: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """As many random assignments as the chosen ones, and as many first, second … choices among them."""
    valid_M = valid_N.nonzero()[:, 0].cpu()
    for _ in range(draws):
        random_NK = torch.zeros(chosen_NK.shape, dtype=torch.bool)
        for k, count in enumerate(chosen_NK.sum(dim=0).tolist()):
            random_NK[valid_M[torch.randperm(len(valid_M), generator=generator)[:count]], k] = True
        yield random_NK.to(chosen_NK.device)
