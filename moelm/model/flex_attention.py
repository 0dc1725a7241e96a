"""Masked attention on GPUs by torch's FlexAttention: blocks of logits without an allowed pair are not computed.

A boolean mask costs as much as full attention or more, and memory for every pair of positions, as does a cap of the logits.
FlexAttention is fast only in compiled code, in which it becomes one kernel with the mask and the cap inside.

Shapes: B batch, T positions, H query heads, G key/value heads, C head width.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from moelm.config import ModelConfig
from moelm.model.backend import autocast_dtype

MIN_HEAD_DIM = 16
"""The kernel takes no smaller heads."""


def use_flex_attention(config: ModelConfig, device: torch.device, compiled: bool) -> bool:
    """Whether masks, windows and caps are computed by FlexAttention: in compiled code on GPUs in bfloat16.

    Args:
        compiled: whether the attention is compiled.
    """
    fits = config.size_per_head >= MIN_HEAD_DIM
    return compiled and device.type != "cpu" and fits and autocast_dtype(device.type) == torch.bfloat16


def flex_mask(length: int, window: int | None, segments_BT: Tensor | None, device: torch.device) -> BlockMask:
    """The same mask as `attention_mask`'s for as many queries as keys, by blocks."""

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key <= query
        if window is not None:
            allowed = allowed & (key > query - window)
        if segments_BT is not None:
            allowed = allowed & (segments_BT[row, query] == segments_BT[row, key])
        return allowed

    rows = None if segments_BT is None else len(segments_BT)
    create = create_block_mask if torch.compiler.is_compiling() else _compiled_create_block_mask()
    return create(attends, rows, None, length, length, device=device)


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    """Not compiled, it holds several integers for each pair of positions."""
    return torch.compile(create_block_mask)


def flex_masked_attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, mask: BlockMask, cap: float | None) -> Tensor:
    """Attention with a mask from `flex_mask`; logits are limited as by `capped_attention`."""

    def limit(logit: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return logit if cap is None else cap * (logit / cap).tanh()

    grouped = q_BHTC.shape[1] != k_BGTC.shape[1]
    output = flex_attention(q_BHTC, k_BGTC, v_BGTC, None if cap is None else limit, mask, enable_gqa=grouped)
    assert isinstance(output, Tensor)
    return output
