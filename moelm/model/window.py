"""Sliding-window attention in blocks of queries, each against the few blocks of keys that its window reaches.

A mask over all keys would cost more than attention without a window; here the work grows with the window. The first
queries, whose window reaches the start, are plain causal attention.

Shapes: B batch, T positions, H query heads, G key/value heads, C head width, N blocks, Q queries and S keys of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries of a block: with fewer there are too many small products, with more too many masked ones."""


class Windows(NamedTuple):
    """How positions are cut up, and which keys of its block a query sees."""

    window: int
    """Positions that a query sees, itself included."""
    before: int
    """Blocks of keys ahead of the queries' own."""
    seen_QS: Tensor


def plan_windows(window: int, device: torch.device) -> Windows:
    """The cut for a window."""
    block = min(BLOCK, window)
    before = -(-(window - 1) // block)
    query_Q1 = torch.arange(block, device=device)[:, None]
    key_S = torch.arange(-before * block, block, device=device)
    return Windows(window, before, (key_S <= query_Q1) & (key_S > query_Q1 - window))


def windowed_attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, windows: Windows) -> Tensor:
    """Causal attention inside a window smaller than the positions are many; `(B, H, T, C)`."""
    batch, heads, positions, _ = q_BHTC.shape
    window, grouped = windows.window, heads != k_BGTC.shape[1]
    q, k, v = (x[:, :, :window] for x in (q_BHTC, k_BGTC, v_BGTC))
    first_BHTC = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    rest_NBHQC = F.scaled_dot_product_attention(
        _blocks(q_BHTC, windows, 0),
        _blocks(k_BGTC, windows, windows.before),
        _blocks(v_BGTC, windows, windows.before),
        attn_mask=windows.seen_QS,
        enable_gqa=grouped,
    )
    rest_BHTC = torch.unflatten(rest_NBHQC, 1, (batch, heads)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return torch.cat((first_BHTC, rest_BHTC[:, :, : positions - window]), dim=2)


def _blocks(x_BHTC: Tensor, windows: Windows, before: int) -> Tensor:
    """Each block past the first window, after the `before` ones ahead of it, blocks first: `(N, B*H, (before+1)*Q, C)`."""
    block, start = len(windows.seen_QS), windows.window - before * len(windows.seen_QS)
    blocks = -(-(x_BHTC.shape[2] - windows.window) // block)
    length = blocks * block
    tail = start + before * block + length - x_BHTC.shape[2]
    padded_BHTC = F.pad(x_BHTC, (0, 0, -start, tail))  # a start past the first position cuts
    shifted = [padded_BHTC[:, :, shift * block : shift * block + length] for shift in range(before + 1)]
    joined_BHNSC = torch.cat([torch.unflatten(part, 2, (blocks, block)) for part in shifted], dim=3)
    return joined_BHNSC.permute(2, 0, 1, 3, 4).flatten(1, 2)
