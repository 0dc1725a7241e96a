"""Windowed attention in blocks against one mask over all keys."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.attention import attention_mask
from moelm.model.sliding_window import window_blocks, windowed_attention


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(("positions", "window"), [(9, 1), (16, 4), (17, 5), (30, 29), (31, 8)])
def test_blocks_are_the_mask(positions: int, window: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelm.model.sliding_window.BLOCK", block)
    torch.manual_seed(0)
    q = torch.randn(2, 4, positions, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, positions, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = attention_mask(positions, positions, window, q.device)
    meant = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    mine = windowed_attention(q, k, v, window_blocks(window, q.device))
    torch.testing.assert_close(mine, meant)
    pull = torch.randn_like(meant)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), pull) for y in (mine, meant)), strict=True):
        torch.testing.assert_close(a, b)
