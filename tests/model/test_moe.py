"""The sparse layer against a loop over tokens and experts written from the papers' equations, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelm.config import MoEFFNConfig
from moelm.model.moe import MoE, take_rows


def naive(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, k: int) -> Tensor:
    """y = sum over the k best experts of softmax-over-those(h)_i * w2_i (silu(w1_i x) * w3_i x)."""
    rows = []
    for token in x:
        logits = [token @ router[e] for e in range(len(router))]
        best = sorted(range(len(router)), key=lambda e: -logits[e].item())[:k]
        norm = sum(logits[e].exp() for e in best)
        total = torch.zeros_like(token)
        for e in best:
            gate = w1[e] @ token
            hidden = gate / (1 + (-gate).exp()) * (w3[e] @ token)
            total = total + logits[e].exp() / norm * (w2[e] @ hidden)
        rows.append(total)
    return torch.stack(rows)


def layer(dim: int, hidden: int, experts: int, k: int, seed: int) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(dim, MoEFFNConfig(kind="moe", hidden_dim=hidden, num_experts=experts, top_k=k))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 12), experts=st.integers(1, 7), data=st.data(), seed=st.integers(0, 99))
def test_matches_the_equations_in_values_and_gradients(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts))
    moe = layer(6, 5, experts, k, seed)
    x = torch.randn(1, tokens, 6, requires_grad=True)
    weight = torch.randn(tokens, 6)
    y, _ = moe(x)
    (y[0] * weight).sum().backward()

    doubles = [
        p.detach().double().requires_grad_() for p in (moe.router.weight, moe.experts.w1, moe.experts.w2, moe.experts.w3)
    ]
    x64 = x.detach()[0].double().requires_grad_()
    expected = naive(x64, *doubles, k)
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-4, atol=1e-5)
    ours = [x.grad[0], moe.router.weight.grad, moe.experts.w1.grad, moe.experts.w2.grad, moe.experts.w3.grad]
    for mine, theirs in zip(ours, [x64.grad, *(d.grad for d in doubles)], strict=True):
        theirs = torch.zeros_like(mine).double() if theirs is None else theirs
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-5)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    moe = layer(4, 4, 3, 1, 0)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0] = 1.0
    y, routing = moe(torch.ones(1, 5, 4))
    y.sum().backward()
    assert set(routing.experts_NK.flatten().tolist()) == {0}
    assert moe.experts.w1.grad[0].abs().sum() > 0
    assert moe.experts.w1.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("k", [1, 2, 8])
def test_gates_equal_softmax_topk_renormalise(k: int) -> None:
    moe = layer(8, 4, 8, k, 1)
    _, routing = moe(torch.randn(1, 16, 8))
    top, chosen = routing.probs_NE.topk(k)
    assert torch.equal(chosen, routing.experts_NK)
    torch.testing.assert_close(routing.gates_NK, top / top.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(routing.gates_NK.sum(dim=-1), torch.ones(16))


def test_take_rows_has_the_gradient_of_indexing() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(8)
    inverse = order.argsort()
    assert torch.autograd.gradcheck(lambda rows: take_rows(rows, order, inverse, 2), x)
    assert math.isclose(take_rows(x, order, inverse, 2).sum().item(), 2 * x.sum().item(), abs_tol=1e-9)
