"""Rotary position embeddings (Su et al. 2021), in the rotate-half layout, with scaled frequencies for long contexts.

Shapes: B batch, T positions, H heads, C head width, R rotated part of a head, F = R/2 frequencies.
"""

import math

import torch
from torch import Tensor

from moelm.config import LinearRopeConfig, Llama3RopeConfig, ModelConfig, YarnRopeConfig


def rope_tables(positions_T: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`.

    Returns:
        Two float32 tensors of shape `(T, R)`; the sines of the first half are negated.
    """
    frequencies_F, scale = _frequencies(config, positions_T.device)
    angles = positions_T.float()[:, None] * frequencies_F
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R elements of each head by its position; the dtype of the input is preserved.

    Args:
        cos_TR, sin_TR: the tables of `rope_tables`.
    """
    rotated = cos_TR.shape[-1]
    if rotated < x_BTHC.shape[-1]:
        first, rest = x_BTHC[..., :rotated], x_BTHC[..., rotated:]
        return torch.cat((rotate(first, cos_TR, sin_TR), rest), dim=-1)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    swapped_BTHR = x_BTHC.roll(rotated // 2, dims=-1)
    return torch.addcmul(x_BTHC * cos_T1R, swapped_BTHR, sin_T1R).to(x_BTHC.dtype)


def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies in radians per position, and the factor on rotated queries and keys."""
    width, theta = config.rotary_dim, config.rope_theta
    powers_F = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    frequencies_F = theta**-powers_F
    match config.rope_scaling:
        case None:
            return frequencies_F, 1.0
        case LinearRopeConfig() as scaling:
            return frequencies_F / scaling.factor, 1.0
        case Llama3RopeConfig() as scaling:
            # Periods in the original context, from low_freq_factor (all scaled) to high_freq_factor (all kept).
            periods_F = frequencies_F * scaling.original_max_seq_len / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept_F = ((periods_F - low) / (high - low)).clamp(0, 1)
            return frequencies_F * kept_F + frequencies_F / scaling.factor * (1 - kept_F), 1.0
        case YarnRopeConfig() as scaling:

            def index(periods: float) -> float:
                """The index of the frequency with so many periods in the original context."""
                ratio = scaling.original_max_seq_len / (periods * 2 * math.pi)
                return width * math.log(ratio) / (2 * math.log(theta))

            first, last = max(math.floor(index(scaling.beta_fast)), 0), min(math.ceil(index(scaling.beta_slow)), width - 1)
            # The ramp is over indices, between two whole ones, as in the authors' code.
            indices_F = torch.arange(width // 2, device=device, dtype=torch.float32)
            kept_F = 1 - ((indices_F - first) / max(last - first, 1e-3)).clamp(0, 1)
            return frequencies_F * kept_F + frequencies_F / scaling.factor * (1 - kept_F), scaling.scale
