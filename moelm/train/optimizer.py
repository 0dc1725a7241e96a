"""AdamW, the gradient norm and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moelm.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices and expert stacks, not on norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


@torch.no_grad()
def gradient_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Squared norm of each parameter's local gradient, float64 `(P,)`, to be summed over processes.

    Replicated gradients are divided by the number of replicas, so that every element counts once. Rows, which are never
    sharded, are summed in the gradient's dtype, and their sums in float64: in float32, half a million squares would be off
    by 5e-6, and by another amount for every sharding.
    """
    grads, replicas = [], []
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            grads.append(grad.to_local() if isinstance(grad, DTensor) else grad)
            replicas.append(_num_replicas(parameter))
    squares_P = torch.stack([torch.linalg.vector_norm(grad, dim=-1).double().square().sum() for grad in grads])
    return squares_P / torch.tensor(replicas, device=squares_P.device)


def _num_replicas(parameter: Tensor) -> int:
    """Number of processes that hold the same shard of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if placement.is_replicate())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], squares_P: Tensor, limit: float) -> Tensor:
    """Scale all gradients to a global norm of at most `limit`.

    Squares are added one parameter after another, so that a parameter with a zero gradient changes no bit of the norm; this
    keeps a mixture of one expert bitwise equal to the dense model.

    Args:
        squares_P: `gradient_squares`, summed over processes.

    Returns:
        The norm before scaling, a float64 scalar.
    """
    total = torch.zeros((), dtype=torch.float64, device=squares_P.device)
    for square in squares_P.unbind():
        total = total + square
    total = total.sqrt()
    scale = (limit / (total + 1e-6)).clamp(max=1.0).float()
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], scale)
    return total
