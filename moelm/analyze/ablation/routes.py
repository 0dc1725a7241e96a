"""The loss with other routes than the router's: does it matter which experts a token gets?

A replaced route has other experts; its gates are those of the token's own choices, best first, so that nothing but the
experts changes.

Shapes: N tokens, M tokens of a subset, E experts, K experts per token, L sparse layers, D documents.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelm.analyze.ablation.cached_pass import CachedPass, RouteChange, subset_of_routing
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.counts import Ints, add_counts
from moelm.analyze.layers import sparse_ffn
from moelm.config import ModelConfig
from moelm.model import Routing
from moelm.model.moe.router import FixedRouter

REPLACEMENTS = {
    "uniform": "random",
    "hash": "hash",
    "shuffled": "shuffled",
    "shuffled_in_domain": "in domain",
    "second_best": "next best",
}
"""Keys of routing.json and short names: uniformly random experts; a fixed random table by token id; the route of a random
other token, which has the same loads; that of a random token of the same domain; the next best experts after those of the
route."""
HASH_STREAM = 1 << 20
"""Added to the layer, so that the table is not that of a model whose own router is a hash."""
SAMPLED_ROUTES = 8
"""Random routes that a token's own is compared with."""
EVERY = 16
"""One token of so many gets a random route at a time, so that the others' routes are mostly as before."""


def replacements(config: ModelConfig) -> tuple[str, ...]:
    """Those of `REPLACEMENTS` that a model has: a token needs as many other experts for its next best ones."""
    ffn = sparse_ffn(config)
    has_next_best = ffn.router.kind != "hierarchical" and 2 * ffn.top_k <= ffn.num_experts
    return tuple(name for name in REPLACEMENTS if has_next_best or name != "second_best")


class RouteSums(NamedTuple):
    """Sums by document, times `1 / UNIT`."""

    replaced: Ints
    """`(replacements, L, D)`: loss with each replacement minus that of the unchanged model."""
    better: Ints
    """`(L, D)`: share of the sampled routes that have a higher loss than the token's own, over the sampled tokens. In both
    cases as many other tokens of the text have random routes."""
    regret: Ints
    """`(2, L, D)`: how far the best of the sampled routes is below the token's own, at least 0; and the same for a sampled
    route in place of its own, compared with the others."""
    sampled: Ints
    """`(D,)`: sampled tokens."""
    load: Ints
    """`(L, E, D)`: assignments of each expert."""


def replace_routes(text: AblationText, seed: int, after_layer: Callable[[], None]) -> RouteSums:
    """Replace the routes of each layer by itself.

    Args:
        seed: of the random routes.
        after_layer: called after each layer of a batch.
    """
    layers, documents = text.model.config.sparse_layers, len(text.documents)
    shape, names = (len(layers), documents), replacements(text.model.config)
    sums = RouteSums(
        np.zeros((len(names), *shape), dtype=np.int64),
        np.zeros(shape, dtype=np.int64),
        np.zeros((2, *shape), dtype=np.int64),
        np.zeros(documents, dtype=np.int64),
        np.zeros((len(layers), sparse_ffn(text.model.config).num_experts, documents), dtype=np.int64),
    )
    domain_D = torch.from_numpy(text.domains).to(text.device)
    for number, cached in text.passes():
        generator = torch.Generator().manual_seed(seed + number)
        valid_M = cached.batch.valid_N.nonzero()[:, 0]
        document_M = text.document_of(cached)[valid_M]
        domain_M = domain_D[document_M]
        size = -(-len(valid_M) // EVERY)
        order_M = torch.randperm(len(valid_M), generator=generator).to(valid_M.device)
        groups = valid_M[order_M[:size]], valid_M[order_M[size : 2 * size]]
        add_counts(sums.sampled, document_M[order_M[: 2 * size]])
        for index, layer in enumerate(layers):
            routing = subset_of_routing(cached.layers[layer].routing, valid_M)
            others = [_other_experts(name, cached, layer, valid_M, routing, domain_M, generator) for name in names]
            changes = [RouteChange(valid_M, routing._replace(experts_NK=experts_MK)) for experts_MK in others]
            for kind, losses_N in enumerate(cached.losses_with(layer, changes)):
                sums.replaced[kind, index] += text.by_document(losses_N - cached.losses_N, cached)
            add_counts(sums.load[index], routing.experts_NK, document_M[:, None])
            _add_sampled_routes(sums, index, text, cached, layer, groups, generator)
            after_layer()
    return RouteSums(*(text.ranks.all_reduce_array(each, text.device) for each in sums))


def _other_experts(
    name: str,
    cached: CachedPass,
    layer: int,
    tokens_M: Tensor,
    routing: Routing,
    domain_M: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The experts of one of `REPLACEMENTS` for some tokens, `(M, K)`."""
    experts_MK, num_experts = routing.experts_NK, routing.num_experts
    random_M = torch.rand(len(tokens_M), generator=generator, dtype=torch.float64).to(experts_MK.device)
    match name:
        case "uniform":
            return _uniform_experts(routing, generator)
        case "hash":
            fixed = FixedRouter(num_experts, experts_MK.shape[1], HASH_STREAM + layer, by_token=True).to(experts_MK.device)
            hashed: Tensor = fixed(
                cached.layers[layer].normed_ND[tokens_M], cached.context(layer).subset(tokens_M)
            ).experts_NK
            return hashed
        case "shuffled":
            return experts_MK[random_M.argsort()]
        case "shuffled_in_domain":
            order_M = (domain_M + random_M).argsort()  # by domain, in random order within each
            by_domain_M = domain_M.argsort(stable=True)
            partner_M = torch.empty_like(order_M)
            partner_M[by_domain_M] = order_M
            return experts_MK[partner_M]
        case "second_best":
            available_ME = torch.ones_like(routing.probs_NE, dtype=torch.bool).scatter(1, experts_MK, False)
            return cached.reroute(layer, tokens_M, available_ME).experts_NK
        case _:
            raise ValueError(name)


def _uniform_experts(routing: Routing, generator: torch.Generator) -> Tensor:
    scores_ME = torch.rand(routing.probs_NE.shape, generator=generator)
    return scores_ME.topk(routing.experts_NK.shape[1], dim=-1).indices.to(routing.experts_NK.device)


def _add_sampled_routes(
    sums: RouteSums,
    index: int,
    text: AblationText,
    cached: CachedPass,
    layer: int,
    groups: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    """Compare the routes of two groups of tokens with random ones, in the layer of the given index.

    While one group has random routes, the losses of the other one are those of its own routes, with as many random routes
    in the rest of the text.
    """
    losses = []
    for tokens_M in groups:
        routing = subset_of_routing(cached.layers[layer].routing, tokens_M)
        experts = [_uniform_experts(routing, generator) for _ in range(SAMPLED_ROUTES)]
        changes = [RouteChange(tokens_M, routing._replace(experts_NK=experts_MK)) for experts_MK in experts]
        losses.append(cached.losses_with(layer, changes).t())
    for tokens_M, random_NR, own_NR in zip(groups, losses, reversed(losses), strict=True):
        random_MR, own_MR = random_NR[tokens_M], own_NR[tokens_M]
        better_M = ((random_MR > own_MR).double() + 0.5 * (random_MR == own_MR).double()).mean(dim=1)
        # The last random route stands for the token's own, and both are compared with the same others.
        best_M = random_MR[:, :-1].amin(dim=1)
        regrets = [(each_M - best_M).clamp_min(0) for each_M in (own_MR[:, -1], random_MR[:, -1])]
        for target, value_M in zip((sums.better, *sums.regret), (better_M, *regrets), strict=True):
            value_N = torch.zeros(len(cached.losses_N), dtype=torch.float64, device=value_M.device)
            target[index] += text.by_document(value_N.index_copy(0, tokens_M, value_M.double()), cached)
