"""Rotary position embeddings (Su et al. 2021), in the rotate-half layout.

Shapes: B batch, T positions, H heads, C head width.
"""

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`.

    Returns:
        Two float32 tensors of shape `(T, head_dim)`; the sines of the first half are negated.
    """
    powers = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T.float()[:, None] * theta**-powers
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate each head by its position; the dtype of the input is preserved.

    Args:
        cos_TC, sin_TC: the tables of `rope_tables`.
    """
    cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
    swapped_BTHC = x_BTHC.roll(x_BTHC.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BTHC * cos_T1C, swapped_BTHC, sin_T1C).to(x_BTHC.dtype)
