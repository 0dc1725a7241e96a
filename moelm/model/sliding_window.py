"""Sliding-window attention in blocks of queries, each with the blocks of keys within its window.

The cost is proportional to the window, whereas a mask over all keys would cost more than full attention. The first queries,
whose window reaches the start, use plain causal attention.

Shapes: B batch, T positions, H query heads, G key/value heads, C head width, N blocks, Q queries and S keys of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries per block: fewer make too many small products, more compute too many masked ones."""


class WindowBlocks(NamedTuple):
    """The division of positions into blocks, and the mask within a block."""

    window: int
    """Positions that a query attends to, itself included."""
    before: int
    """Blocks of keys before the queries' own."""
    mask_QS: Tensor
    """Whether a query attends to a key."""


def masked_attention(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries to the keys that a mask allows; the number of key heads divides that of query heads.

    On GPUs keys and values are repeated for all query heads: with fewer of them and a mask, the only kernel that is always
    available writes all logits to memory, in float32.
    """
    group_size = q_BHTC.shape[1] // k_BGSC.shape[1]
    if group_size > 1 and q_BHTC.device.type != "cpu":
        k_BGSC, v_BGSC = (x.repeat_interleave(group_size, dim=1) for x in (k_BGSC, v_BGSC))
        group_size = 1
    return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, attn_mask=mask, enable_gqa=group_size > 1)


def window_blocks(window: int, device: torch.device) -> WindowBlocks:
    """The blocks for a window of this many positions."""
    block = min(BLOCK, window)
    before = -(-(window - 1) // block)
    query_Q1 = torch.arange(block, device=device)[:, None]
    key_S = torch.arange(-before * block, block, device=device)
    return WindowBlocks(window, before, (key_S <= query_Q1) & (key_S > query_Q1 - window))


def windowed_attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, blocks: WindowBlocks) -> Tensor:
    """Causal attention within a window smaller than T, `(B, H, T, C)`."""
    batch, heads, positions, _ = q_BHTC.shape
    window, grouped = blocks.window, heads != k_BGTC.shape[1]
    q, k, v = (x[:, :, :window] for x in (q_BHTC, k_BGTC, v_BGTC))
    first_BHTC = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    keys, values = (_to_blocks(x, blocks, blocks.before) for x in (k_BGTC, v_BGTC))
    rest_NBHQC = masked_attention(_to_blocks(q_BHTC, blocks, 0), keys, values, blocks.mask_QS)
    rest_BHTC = torch.unflatten(rest_NBHQC, 1, (batch, heads)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return torch.cat((first_BHTC, rest_BHTC[:, :, : positions - window]), dim=2)


def _to_blocks(x_BHTC: Tensor, blocks: WindowBlocks, before: int) -> Tensor:
    """The blocks after the first window, each with the `before` blocks preceding it: `(N, B*H, (before+1)*Q, C)`."""
    block = len(blocks.mask_QS)
    start = blocks.window - before * block
    count = -(-(x_BHTC.shape[2] - blocks.window) // block)
    length = count * block
    tail = start + before * block + length - x_BHTC.shape[2]
    padded_BHTC = F.pad(x_BHTC, (0, 0, -start, tail))  # negative padding removes the positions before `start`
    shifted = [padded_BHTC[:, :, shift * block : shift * block + length] for shift in range(before + 1)]
    joined_BHNSC = torch.cat([torch.unflatten(part, 2, (count, block)) for part in shifted], dim=3)
    return joined_BHNSC.permute(2, 0, 1, 3, 4).flatten(1, 2)
