"""Blockwise windowed attention against attention with one mask over all keys."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.attention import attention_mask
from moelm.model.sliding_window import window_blocks, windowed_attention
from tests.tolerance import assert_close


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(("positions", "window"), [(9, 1), (16, 4), (17, 5), (30, 29), (31, 8)])
def test_blocks_equal_the_mask(positions: int, window: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelm.model.sliding_window.BLOCK", block)
    torch.manual_seed(0)
    q = torch.randn(2, 4, positions, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, positions, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = attention_mask(positions, positions, window, q.device)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = windowed_attention(q, k, v, window_blocks(window, q.device))
    assert_close(found, expected)
    upstream = torch.randn_like(expected)
    found_grads, expected_grads = (torch.autograd.grad(y, (q, k, v), upstream) for y in (found, expected))
    scale = max(float(grad.abs().max()) for grad in expected_grads)  # with a window of 1, those of q and k are zero
    for grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, scale=scale)
