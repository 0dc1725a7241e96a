"""The loss with more or fewer experts per token, and with experts removed from every layer: how few suffice.

Shapes: E experts, L sparse layers, D documents.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelm.analyze.ablation.statistics import Floats
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.counts import Ints
from moelm.analyze.layers import sparse_ffn
from moelm.config import MoEFFNConfig
from moelm.model import Transformer
from moelm.model.moe.router import Router

KEPT_SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Shares of each layer's experts that are left after a removal."""
RANDOM_ORDERS = 3
"""Random orders of removal, whose losses are averaged."""


class CapacitySums(NamedTuple):
    """Sums of losses minus those of the unchanged model by document, times `1 / UNIT`."""

    by_top_k: dict[int, Ints]
    """`(D,)` by the number of experts per token."""
    by_removal: dict[str, dict[int, Ints]]
    """`(D,)` by the order of removal and the number of experts left in each layer."""


def vary_capacity(
    text: AblationText, usefulness: Mapping[str, Floats], seed: int, after_batch: Callable[[], None]
) -> CapacitySums:
    """Change the number of experts per token, and remove experts from all layers at once.

    Args:
        usefulness: orders of removal by name: the usefulness of each layer's experts, `(L, E)`. It must come from another
            text. Random orders are added.
        seed: of the random orders.
        after_batch: called after each batch of each change.
    """
    ffn, layers = sparse_ffn(text.model.config), text.model.config.sparse_layers
    unchanged = _losses(text, None, after_batch)
    by_top_k = {}
    for top_k in _other_top_ks(ffn):
        with _top_k(text.model, top_k):
            by_top_k[top_k] = _losses(text, None, after_batch) - unchanged
    if by_top_k:
        by_top_k[ffn.top_k] = np.zeros_like(unchanged)
    rng = np.random.default_rng(seed)
    orders = {name: [each] for name, each in usefulness.items()}
    orders["random"] = [rng.random((len(layers), ffn.num_experts)) for _ in range(RANDOM_ORDERS)]
    by_removal: dict[str, dict[int, Ints]] = {}
    for name, several in orders.items():
        by_removal[name] = {ffn.num_experts: np.zeros_like(unchanged)}
        for left in experts_left(ffn.num_experts, ffn.top_k):
            sums = [_losses(text, _most_useful(each, left, layers, text.device), after_batch) for each in several]
            by_removal[name][left] = sum(sums) // len(sums) - unchanged
    return CapacitySums(by_top_k, by_removal)


def experts_left(num_experts: int, top_k: int) -> list[int]:
    """Numbers of experts that a layer is reduced to, all at least `top_k`."""
    counts = {max(top_k, round(share * num_experts)) for share in KEPT_SHARES}
    return sorted(counts - {num_experts}, reverse=True)


def num_passes(ffn: MoEFFNConfig, orders: int) -> int:
    """Passes over the text that `vary_capacity` makes if `orders` of removal are given."""
    return 1 + len(_other_top_ks(ffn)) + (orders + RANDOM_ORDERS) * len(experts_left(ffn.num_experts, ffn.top_k))


def _other_top_ks(ffn: MoEFFNConfig) -> list[int]:
    """Numbers of experts per token up to twice the model's; none for hierarchical routers, whose number is a product."""
    if ffn.router.kind == "hierarchical":
        return []
    return [top_k for top_k in range(1, min(2 * ffn.top_k, ffn.num_experts) + 1) if top_k != ffn.top_k]


def _losses(text: AblationText, available: dict[int, Tensor] | None, after_batch: Callable[[], None]) -> Ints:
    """Sums of losses by document."""
    sums = np.zeros(len(text.documents), dtype=np.int64)
    for _, cached in text.passes(available):
        sums += text.by_document(cached.losses_N, cached)
        after_batch()
    return text.ranks.all_reduce_array(sums, text.device)


def _most_useful(usefulness_LE: Floats, left: int, layers: list[int], device: torch.device) -> dict[int, Tensor]:
    """The `left` most useful experts of each layer, as `CachedPass` takes them."""
    available = {}
    for layer, useful_E in zip(layers, usefulness_LE, strict=True):
        kept_E = torch.zeros(len(useful_E), dtype=torch.bool)
        kept_E[torch.from_numpy(np.argsort(-useful_E, kind="stable")[:left].copy())] = True
        available[layer] = kept_E.to(device)
    return available


@contextmanager
def _top_k(model: Transformer, top_k: int) -> Iterator[None]:
    """Let all routers select another number of experts for a while."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    before = [router.top_k for router in routers]
    try:
        for router in routers:
            router.top_k = top_k
        yield
    finally:
        for router, own in zip(routers, before, strict=True):
            router.top_k = own
