"""AdamW, its learning-rate schedule as a pure function of the step, and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients to a joint norm of at most `limit`; returns the norm before, as a float64 scalar.

    Squares are summed one parameter after another, so a parameter with no gradient changes no digit of the norm: that
    keeps a mixture of one expert equal to the dense model to the bit.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for norm in torch._foreach_norm(grads):
        total = total + norm.double().square()
    total = total.sqrt()
    scale = (limit / (total + 1e-6)).clamp(max=1.0).float()
    torch._foreach_mul_(grads, scale)
    return total
