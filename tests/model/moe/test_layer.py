"""The sparse layer without its router: dispatch, capacity, shared experts."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.moe.dispatcher import drop_over_capacity, permute, sort_by_expert, unpermute
from moelm.model.moe.router import Routing
from tests.model.moe.test_router import DIM, HIDDEN, build_layer, token_context
from tests.tolerance import assert_close


def make_routing(experts: list[list[int]], num_experts: int) -> Routing:
    """The given choices with random gates."""
    chosen = torch.tensor(experts)
    gates = torch.rand(chosen.shape, dtype=torch.float64)
    return Routing(gates, chosen, torch.full((len(experts), num_experts), 1 / num_experts))


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    moe = build_layer(3, 1, {"kind": "topk"})
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0] = 1.0
    y, routing = moe(torch.ones(1, 5, DIM), token_context(5))
    y.sum().backward()
    assert set(routing.experts_NK.flatten().tolist()) == {0}
    assert moe.experts.w1.grad[0].abs().sum() > 0
    assert moe.experts.w1.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("k", [1, 2, 8])
def test_gates_equal_the_renormalized_softmax(k: int) -> None:
    moe = build_layer(8, k, {"kind": "topk"})
    _, routing = moe(torch.randn(1, 16, DIM), token_context(16))
    top, chosen = routing.probs_NE.topk(k)
    assert torch.equal(chosen, routing.experts_NK)
    assert_close(routing.gates_NK, top / top.sum(dim=-1, keepdim=True))


def test_permute_and_unpermute_have_the_gradients_of_indexing() -> None:
    torch.manual_seed(0)
    routing = make_routing([[0, 2], [2, 1], [3, 0], [2, 3]], 4)
    dropped = torch.tensor([[False, True], [True, True], [False] * 2, [False] * 2])
    for permutation in (sort_by_expert(routing), sort_by_expert(routing._replace(dropped_NK=dropped))):
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda rows, p=permutation: permute(rows, p), x)
        y = torch.randn(len(permutation.order_S), 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda rows, p=permutation: unpermute(rows, p), y)


def test_rows_are_in_token_order_within_each_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    routing = make_routing([torch.randperm(7)[:3].tolist() for _ in range(50)], 9)  # experts 7 and 8 get no row
    dropped = torch.rand(50, 3) < 0.3
    for case in (routing, routing._replace(dropped_NK=dropped)):
        with monkeypatch.context() as patch:
            patch.setattr("moelm.model.moe.dispatcher.eager_on_cpu", lambda x: False)
            expected = sort_by_expert(case)
        for found, wanted in zip(sort_by_expert(case), expected, strict=True):
            assert torch.equal(found, wanted)


def test_the_rows_of_a_token_are_added_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    routing = make_routing([torch.randperm(6)[:4].tolist() for _ in range(30)], 6)
    for case in (routing, routing._replace(dropped_NK=torch.rand(30, 4) < 0.5)):
        permutation = sort_by_expert(case)
        y = torch.randn(len(permutation.order_S), 8).bfloat16()
        padded = torch.cat((y, y.new_zeros(1, 8)))
        exact = padded[permutation.row_NK].double().sum(dim=1)
        error = (unpermute(y, permutation) - exact).abs()
        assert (error <= exact.abs() * torch.finfo(torch.bfloat16).eps / 2).all()


def test_full_experts_drop_the_latest_of_the_last_choices() -> None:
    # 4 tokens, 2 choices, 2 experts: with factor 0.75 an expert takes 3 of its 4.
    routing = drop_over_capacity(make_routing([[0, 1], [0, 1], [1, 0], [0, 1]], 2), 0.75, None)
    assert routing.dropped_NK.tolist() == [[False, False], [False, False], [False, True], [False, True]]
    assert sort_by_expert(routing).ends_E.tolist() == [3, 6]


def test_padding_takes_no_capacity() -> None:
    valid = torch.tensor([False, True, True, True])
    # 3 tokens, 2 experts: each expert has capacity for 2.
    routing = drop_over_capacity(make_routing([[0], [0], [0], [1]], 2), 1.0, valid)
    assert routing.dropped_NK.flatten().tolist() == [True, False, False, False]


def test_a_dropped_assignment_adds_nothing() -> None:
    moe = build_layer(2, 2, {"kind": "topk"}, capacity_factor=0.5)
    x = torch.randn(1, 6, DIM)
    y, routing = moe(x, token_context(6))
    assert int(routing.dropped_NK.sum()) == 6
    w1, w2, w3 = (getattr(moe.experts, name) for name in ("w1", "w2", "w3"))
    for n in range(6):
        expected = torch.zeros(DIM)
        for k in range(2):
            if not routing.dropped_NK[n, k]:
                e = int(routing.experts_NK[n, k])
                hidden = F.silu(w1[e] @ x[0, n]) * (w3[e] @ x[0, n])
                expected = expected + routing.gates_NK[n, k] * (w2[e] @ hidden)
        assert_close(y[0, n], expected)
    unlimited = moe.eval()(x, token_context(6))[1]
    assert unlimited.dropped_NK is None


def test_shared_experts_are_added_for_every_token() -> None:
    moe = build_layer(4, 1, {"kind": "topk"}, shared_experts=2)
    assert moe.shared.w1.shape == (2 * HIDDEN, DIM)
    x = torch.randn(1, 5, DIM)
    y, shared = moe(x, token_context(5))[0], moe.shared
    hidden = F.silu(x @ shared.w1.t()) * (x @ shared.w3.t())
    moe.shared = None
    assert_close(y, moe(x, token_context(5))[0] + hidden @ shared.w2.t())
