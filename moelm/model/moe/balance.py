"""Balance losses and load statistics of one layer, as pure functions of sums over a batch's valid tokens.

Sums over micro-batches and processes add up to those of the global batch, so the losses do not depend on how a batch is
divided. Loss weights and scopes are applied in `moelm.train.objective`. Padding is never included.

Shapes: N tokens, E experts, K choices per token, A groups of experts (1 for flat routers).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moelm.model.moe.router import Routing

Sums = dict[str, Tensor]
"""Sums over tokens by name, float64.

`tokens` (): valid tokens. `counts` (E): assignments, before any are dropped. `importance` (E): gates. `probs` (E):
probabilities. `entropy` (): of the distribution. `z` (), if the router has logits: squared log-partitions. `load` (E),
`group_load` (A) and `group_tokens` (A), if it has noise: the smooth load. `dropped` (), if capacity is limited: dropped
assignments.
"""

LayerSums = dict[int, Sums]
"""The sums of each layer."""


def routing_sums(routing: Routing, valid_N: Tensor) -> Sums:
    """The sums of one layer's routing that losses and statistics need; differentiable in the router's outputs."""

    def total(values: Tensor) -> Tensor:
        valid = valid_N if values.dim() == 1 else valid_N[:, None]
        return (values * valid).sum(dim=0, dtype=torch.float64)

    chosen_NK = torch.ones_like(routing.experts_NK, dtype=torch.bool)
    if routing.chosen_NK is not None:
        chosen_NK = routing.chosen_NK
    sums = {
        "tokens": valid_N.sum().double(),
        "counts": total(torch.zeros_like(routing.probs_NE).scatter_add(-1, routing.experts_NK, chosen_NK.float())),
        "importance": total(
            torch.zeros_like(routing.probs_NE).scatter_add(-1, routing.experts_NK, routing.gates_NK * chosen_NK)
        ),
        "probs": total(routing.probs_NE),
        "entropy": total(entropy(routing.probs_NE.detach())),
    }
    if routing.logits_NE is not None:
        sums["z"] = total(routing.logits_NE.logsumexp(dim=-1).square())
    if (smooth := routing.smooth) is not None:
        groups = smooth.visited_NA.shape[1]
        visited_NE = smooth.visited_NA.repeat_interleave(routing.num_experts // groups, dim=1)
        sums["load"] = total(smooth.experts_NE * visited_NE)
        sums["group_load"] = total(smooth.groups_NA)
        sums["group_tokens"] = total(smooth.visited_NA.double())
    if routing.dropped_NK is not None:
        sums["dropped"] = total(routing.dropped_NK.double().sum(dim=-1))
    return sums


def entropy(probs_NE: Tensor) -> Tensor:
    """The entropy of each distribution, `(N,)`, in nats."""
    # In less than a third of the time of torch.special.entr.
    return -(probs_NE * probs_NE.clamp_min(torch.finfo(probs_NE.dtype).tiny).log()).sum(dim=-1)


def add_sums(parts: Iterable[Sums]) -> Sums:
    """The sums of a batch from those of its parts, detached."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value.detach() if name in total else value.detach()
    return total


def add_layer_sums(parts: Iterable[LayerSums]) -> LayerSums:
    """The sums of a batch from those of its micro-batches, detached."""
    parts = list(parts)
    return {layer: add_sums(part[layer] for part in parts) for layer in (parts[0] if parts else ())}


def map_layer_sums(layers: LayerSums, function: Callable[[list[Tensor]], list[Tensor]]) -> LayerSums:
    """Call `function` once on all tensors, to pay for one transfer or collective instead of many."""
    keys = [(layer, name) for layer, sums in layers.items() for name in sums]
    result: LayerSums = {layer: {} for layer in layers}
    for (layer, name), value in zip(keys, function([layers[layer][name] for layer, name in keys]), strict=True):
        result[layer][name] = value
    return result


def aux_loss(sums: Sums) -> Tensor:
    """Load-balance loss of Switch Transformer (Fedus et al. 2021, eqs 4-6): E * sum_i f_i P_i, balanced at 1.

    f_i is expert i's share of all assignments, which sums to 1 for any k; P_i is the mean of the router's distribution.
    """
    load_E = sums["counts"] / sums["counts"].sum().clamp_min(1)
    mean_probs_E = sums["probs"] / sums["tokens"].clamp_min(1)
    return load_E.numel() * (load_E @ mean_probs_E)


def sequence_aux_loss(routing: Routing, valid_BT: Tensor) -> Tensor:
    """Mean of the sequences' own `aux_loss`, weighted by valid tokens (DeepSeek-V3 2024, eqs 17-20)."""
    valid_BT1 = valid_BT[..., None]
    assigned_BTE = (
        torch.zeros_like(routing.probs_NE)
        .scatter_add(-1, routing.experts_NK, torch.ones_like(routing.gates_NK))
        .view(*valid_BT.shape, -1)
    )
    probs_BE = (routing.probs_NE.view_as(assigned_BTE) * valid_BT1).sum(dim=1, dtype=torch.float64)
    counts_BE = (assigned_BTE * valid_BT1).sum(dim=1, dtype=torch.float64)
    load_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp_min(1)
    # Each sequence is weighted by its number of tokens, which cancels the division in the mean P.
    return routing.num_experts * (load_BE * probs_BE).sum() / valid_BT.sum().clamp_min(1)


def z_loss(sums: Sums) -> Tensor:
    """Router z-loss of ST-MoE (Zoph et al. 2022, eq. 5): the mean squared log-sum-exp of the logits."""
    return sums["z"] / sums["tokens"].clamp_min(1)


def importance_loss(sums: Sums) -> Tensor:
    """CV(Importance)^2, Importance being the gates summed over the batch (Shazeer et al. 2017, eqs 6-7)."""
    return squared_variation(sums["importance"])


def load_loss(sums: Sums) -> Tensor:
    """CV(Load)^2 with the smooth load (Shazeer et al. 2017, eqs 10-11)."""
    return squared_variation(smooth_load(sums))


def smooth_load(sums: Sums) -> Tensor:
    """Load_ij = Load_primary,i * Load_i(X^i)_j / |X^i| (Shazeer et al. 2017, eq. 14); for one group, eq. 10."""
    inner_AJ = sums["load"].view(sums["group_load"].numel(), -1)
    scale_A = sums["group_load"] / sums["group_tokens"].clamp_min(1)
    return (inner_AJ * scale_A[:, None]).flatten()


def squared_variation(amounts_E: Tensor) -> Tensor:
    """The squared coefficient of variation, with the population variance; 0 if all amounts are 0."""
    mean = amounts_E.mean()
    return amounts_E.var(correction=0) / mean.square().clamp_min(torch.finfo(amounts_E.dtype).tiny)


def expert_bias_delta(counts_E: Tensor, rate: float) -> Tensor:
    """Bias update of loss-free balancing (Wang et al. 2024, algorithm 1): +rate below the mean load, -rate above it.

    The mean of the update is then subtracted. That changes no selection, because it is the same for all experts; without
    it the mean of the bias drifts away from 0 (torchtitan #1506).
    """
    sign_E = (counts_E.mean() - counts_E).sign()
    return rate * (sign_E - sign_E.mean())
