"""RMSNorm, fused for CPUs.

Shapes: C width of the last dimension.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.model.backend import eager_on_cpu


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    floor: Tensor
    """Norm of a vector whose mean square is eps; a buffer."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.register_buffer("floor", torch.empty(()), persistent=False)
        self.floor_value = math.sqrt(width * eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to one."""
        super().reset_parameters()
        if hasattr(self, "floor"):  # not yet when the base class calls this
            self.floor.fill_(self.floor_value)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; shape and dtype are those of the input."""
        if not eager_on_cpu(x):
            return F.rms_norm(x, list(self.normalized_shape), self.weight, self.eps)
        if not torch.is_grad_enabled():
            return _multiply(x, _scale(x, self.floor), self.weight)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.floor)  # type: ignore[no-untyped-call]
        return y


def _multiply(x: Tensor, scale: Tensor, weight_C: Tensor) -> Tensor:
    return (x * scale).mul_(weight_C).to(x.dtype)


def _scale(x: Tensor, floor: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each vector, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.hypot_(floor).mul_(x.shape[-1] ** -0.5).reciprocal_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, floor: Tensor) -> Tensor:
        scale = _scale(x, floor)
        ctx.save_for_backward(x, weight_C, scale)
        return _multiply(x, scale, weight_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With scale s: dx = s (g w - x s^2 mean(g w x)), dw = sum(g x s) over all vectors."""
        x, weight_C, scale = ctx.saved_tensors
        product = (grads[0] * x).to(scale.dtype)
        projection = (product @ weight_C.to(scale.dtype))[..., None] * scale.pow(3) / -x.shape[-1]
        grad: Tensor = (grads[0] * weight_C).mul_(scale).addcmul_(x, projection)
        return grad.to(x.dtype), (scale.flatten() @ product.flatten(0, -2)).to(weight_C.dtype), None
