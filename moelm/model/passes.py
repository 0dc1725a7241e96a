"""Normalisation and rotary positions in few passes over memory, with gradients written out by hand.

On a CPU without a compiler each elementwise operation is a pass over memory, and autograd's own gradient of these two takes
three to five times as many as it needs. Where a compiler or a GPU does the work, the plain formula is left to it.

Shapes: B batch, T positions, H heads, C width of the last dimension.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def by_hand(x: Tensor) -> bool:
    """Whether nobody else saves passes here: neither a GPU's speed nor a compiler."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def by_hand_backward(x: Tensor) -> bool:
    """Whether a gradient written out here is worth its call."""
    return torch.is_grad_enabled() and by_hand(x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of this tensor are computed in: autocast's dtype, or its own."""
    device = x.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.register_buffer("floor", torch.empty(()), persistent=False)
        self.floor_value = math.sqrt(width * eps)
        self.reset_parameters()

    floor: Tensor
    """The norm of a vector whose mean square is eps."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of one."""
        super().reset_parameters()
        if hasattr(self, "floor"):  # not yet when the base class calls this
            self.floor.fill_(self.floor_value)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        if not by_hand(x):
            return F.rms_norm(x, list(self.normalized_shape), self.weight, self.eps)
        if not torch.is_grad_enabled():
            return _scaled(x, _scale(x, self.floor), self.weight)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.floor)  # type: ignore[no-untyped-call]
        return y


def _scaled(x: Tensor, scale: Tensor, weight_C: Tensor) -> Tensor:
    return (x * scale).mul_(weight_C).to(x.dtype)


def _scale(x: Tensor, floor: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each vector, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.hypot_(floor).mul_(x.shape[-1] ** -0.5).reciprocal_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, floor: Tensor) -> Tensor:
        scale = _scale(x, floor)
        ctx.save_for_backward(x, weight_C, scale)
        return _scaled(x, scale, weight_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With s the scale: dx = s (g w - x s^2 mean(g w x)), dw = sum(g x s) over all vectors."""
        x, weight_C, scale = ctx.saved_tensors
        product = (grads[0] * x).to(scale.dtype)
        pull = (product @ weight_C.to(scale.dtype))[..., None] * scale.pow(3) / -x.shape[-1]
        grad: Tensor = (grads[0] * weight_C).mul_(scale).addcmul_(x, pull)
        return grad.to(x.dtype), (scale.flatten() @ product.flatten(0, -2)).to(weight_C.dtype), None


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Turn each head by its position (Su et al. 2021), in the rotate-half layout; the dtype of the input is kept.

    Args:
        cos_TC, sin_TC: the tables of `rope_tables`; the sines of the first half are negated.
    """
    if by_hand_backward(x_BTHC):
        turned: Tensor = _Rotate.apply(x_BTHC, cos_TC[:, None], sin_TC[:, None])  # type: ignore[no-untyped-call]
        return turned
    return _turn(x_BTHC, cos_TC[:, None], sin_TC[:, None])


def _turn(x_BTHC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    swapped_BTHC = x_BTHC.roll(x_BTHC.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BTHC * cos_T1C, swapped_BTHC, sin_T1C).to(x_BTHC.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1C, sin_T1C)
        return _turn(x_BTHC, cos_T1C, sin_T1C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient is turned back."""
        cos_T1C, sin_T1C = ctx.saved_tensors
        return _turn(grads[0], cos_T1C, -sin_T1C), None, None
