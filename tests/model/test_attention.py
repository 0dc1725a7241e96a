"""Attention with all logits in memory against torch's attention."""

import pytest
import torch
import torch.nn.functional as F

from moelm.config import DenseFFNConfig, ModelConfig
from moelm.model import attention
from moelm.model.attention import SHORT, short_causal_attention
from tests.tolerance import assert_close


def heads(batch: int, number: int, length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """In the layout of the model: a transposed view."""
    values = torch.randn(batch, length, number, width, dtype=torch.float64)
    return values.to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [2, 17, 64])
def test_short_attention_equals_torch_s_forward_and_backward(kv_heads: int, length: int) -> None:
    torch.manual_seed(0)
    q, k, v = heads(3, 4, length, 8, torch.float64), *(heads(3, kv_heads, length, 8, torch.float64) for _ in "kv")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = short_causal_attention(q, k, v)
    assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for own, theirs in zip(*(torch.autograd.grad(y, (q, k, v), gradient) for y in (found, expected)), strict=True):
        assert_close(own, theirs)


def test_in_bfloat16_it_is_as_exact_as_the_logits_are() -> None:
    torch.manual_seed(0)
    q, k, v = (heads(2, 2, 256, 32, torch.bfloat16) for _ in "qkv")
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    error = (short_causal_attention(q, k, v).double() - exact).norm() / exact.norm()
    assert error < 2 * 2**-8


@pytest.mark.parametrize(
    ("dtype", "length", "used"),
    [
        (torch.bfloat16, SHORT, True),
        (torch.bfloat16, SHORT + 1, False),
        (torch.float32, 16, False),
        (torch.bfloat16, 1, False),
    ],
)
def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, length: int, used: bool) -> None:
    calls = []
    monkeypatch.setattr(attention, "short_causal_attention", lambda *args: calls.append(args) or args[0])
    ffn = DenseFFNConfig(kind="dense", hidden_dim=8)
    model = attention.Attention(ModelConfig(dim=8, num_layers=1, num_heads=2, ffn=ffn))
    q, k, v = (torch.zeros(1, 2, length, 4, dtype=dtype) for _ in "qkv")
    model._attend(q, k, v, None)
    assert bool(calls) == used
