"""AdamW, its learning-rate schedule as a pure function of the step, and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moelm.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices and stacks of them; norms are left alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of a step counted from 0, of a run of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.schedule:
        case "cosine":
            ratio = 0.5 * (1 + math.cos(math.pi * done))
        case "wsd":
            ratio = min(1.0, (1 - done) / config.decay_fraction)
        case "constant":
            return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * ratio)


@torch.no_grad()
def gradient_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Squared norm of each parameter's gradient, float64 `(P,)`; on several processes the sum over them is it.

    What several hold copies of counts in parts, so that every number of the whole gradient counts once. The rows of
    a matrix, which no layout cuts, are summed in the gradient's dtype and what they give in float64: in float32 half a
    million squares would be off by 5e-6, and by another amount in every layout.
    """
    grads, copies = [], []
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            grads.append(grad.to_local() if isinstance(grad, DTensor) else grad)
            copies.append(_copies(parameter))
    squares_P = torch.stack([torch.linalg.vector_norm(grad, dim=-1).double().square().sum() for grad in grads])
    return squares_P / torch.tensor(copies, device=squares_P.device)


def _copies(parameter: Tensor) -> int:
    """How many processes hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if placement.is_replicate())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], squares_P: Tensor, limit: float) -> Tensor:
    """Scale all gradients to a joint norm of at most `limit`; returns the norm before, as a float64 scalar.

    Squares are summed one parameter after another, so a parameter with no gradient changes no digit of the norm: that
    keeps a mixture of one expert equal to the dense model to the bit.

    Args:
        squares_P: `gradient_squares`, summed over processes.
    """
    total = torch.zeros((), dtype=torch.float64, device=squares_P.device)
    for square in squares_P.unbind():
        total = total + square
    total = total.sqrt()
    scale = (limit / (total + 1e-6)).clamp(max=1.0).float()
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], scale)
    return total
