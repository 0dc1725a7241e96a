"""Balance losses and load statistics, as pure functions of a layer's routing; weights and layers are summed elsewhere.

A loss is a sum over the given tokens divided by `num_tokens`, the tokens of the whole batch, so that the parts of a batch
add up to the loss of the batch however it was cut. Only valid tokens count; padding never does.

Shapes: N tokens, E experts, K experts chosen per token.
"""

import torch
from torch import Tensor

from moelm.model.router import Routing


def expert_counts(routing: Routing, valid_N: Tensor) -> Tensor:
    """Assignments that each expert got from valid tokens, float64 of shape `(E,)`: sums of it stay exact."""
    chosen = routing.experts_NK[valid_N].flatten()
    return torch.bincount(chosen, minlength=routing.logits_NE.shape[-1]).double()


def importance(routing: Routing, valid_N: Tensor) -> Tensor:
    """Sum of the gate values that each expert got from valid tokens (Shazeer et al. 2017, eq. 6), `(E,)`."""
    zeros = torch.zeros_like(routing.logits_NE)
    return zeros.scatter(-1, routing.experts_NK, routing.gates_NK)[valid_N].double().sum(dim=0)


def aux_loss(routing: Routing, valid_N: Tensor, load_E: Tensor, num_tokens: float) -> Tensor:
    """Load-balance loss of Switch Transformer (Fedus et al. 2021, eqs 4-6): E * sum_i f_i P_i.

    Args:
        load_E: f, the share of all assignments each expert got; it sums to 1 for any k, so the balanced loss is 1.
        num_tokens: valid tokens of the whole batch; P is the mean over them of the full softmax.
    """
    mean_probs_E = (routing.probs_NE * valid_N[:, None]).sum(dim=0) / num_tokens
    return load_E.numel() * (load_E.float() * mean_probs_E).sum()


def z_loss(routing: Routing, valid_N: Tensor, num_tokens: float) -> Tensor:
    """Router z-loss of ST-MoE (Zoph et al. 2022, eq. 5): the mean squared log-sum-exp of the logits."""
    return (routing.logits_NE.logsumexp(dim=-1).square() * valid_N).sum() / num_tokens


def entropy(routing: Routing, valid_N: Tensor) -> Tensor:
    """Sum over valid tokens of the entropy of the full softmax, in nats."""
    log_probs_NE = routing.logits_NE.log_softmax(dim=-1)
    return -(log_probs_NE.exp() * log_probs_NE).sum(dim=-1)[valid_N].double().sum()


def variation(amounts_E: Tensor) -> float:
    """Coefficient of variation with the population variance, as in Shazeer et al. 2017; 0 when nothing was counted."""
    mean = amounts_E.mean()
    return float(amounts_E.std(correction=0) / mean) if mean > 0 else 0.0
