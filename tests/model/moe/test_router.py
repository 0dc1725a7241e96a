"""Every router against the equations of its paper: values, gradients, and the corners."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model import rng
from moelm.model.moe import balance
from moelm.model.moe.layer import MoELayer
from moelm.model.moe.router import Routing, TokenContext
from tests.model import oracle

DIM, HIDDEN = 6, 5


def build(experts: int, k: int, router: dict[str, Any], seed: int = 0, **ffn: Any) -> MoELayer:
    tree = {"kind": "moe", "hidden_dim": HIDDEN, "num_experts": experts, "top_k": k, "router": router, **ffn}
    config = ModelConfig.model_validate({"dim": DIM, "num_layers": 1, "num_heads": 1, "ffn": tree})
    moe = MoELayer(config, config.ffn, layer=1)
    torch.manual_seed(seed)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return moe


def context(tokens: int, seed: int = 0, valid: Tensor | None = None) -> TokenContext:
    keys = rng.token_keys(rng.row_keys(seed, 3, torch.tensor([5])), torch.arange(tokens)[None])[0]
    return TokenContext(torch.arange(tokens), keys, valid)


def compare(moe: MoELayer, x: Tensor, about: TokenContext, gates_of: Any, losses: tuple[str, ...] = ()) -> Routing:
    """Outputs, losses and every gradient of the layer against `gates_of(x, parameters)`, in float64."""
    x = x.requires_grad_()
    y, routing = moe(x[None], about)
    mix = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    sums = balance.routing_sums(routing, torch.ones(len(x), dtype=torch.bool))
    total = (y[0] * mix).sum().double()
    for name in losses:
        total = total + {"importance": balance.importance_loss, "load": balance.load_loss}[name](sums)
    total.backward()

    doubles = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    gates, load = gates_of(x64, {name.removeprefix("router."): p for name, p in doubles.items()})
    expected = oracle.mixture(x64, gates, *(doubles[f"experts.w{i}"] for i in (1, 2, 3)))
    wanted = (expected * mix.double()).sum()
    for name in losses:
        wanted = wanted + oracle.squared_variation(oracle.importance(gates) if name == "importance" else load)
    wanted.backward()

    torch.testing.assert_close(y[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in moe.named_parameters():
        theirs = doubles[name].grad if doubles[name].grad is not None else torch.zeros_like(doubles[name])
        torch.testing.assert_close(parameter.grad.double(), theirs, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return routing


SIZES = {"tokens": st.integers(1, 9), "experts": st.integers(1, 6), "data": st.data(), "seed": st.integers(0, 99)}


@settings(max_examples=20, deadline=None)
@given(**SIZES, normalize=st.booleans())
def test_topk(tokens: int, experts: int, data: st.DataObject, seed: int, normalize: bool) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build(experts, k, {"kind": "topk", "normalize": normalize}, seed)
    compare(moe, torch.randn(tokens, DIM), context(tokens), lambda x, p: (oracle.topk(x, p["weight"], k, normalize), []))


@settings(max_examples=20, deadline=None)
@given(**SIZES, normalize=st.booleans())
def test_sigmoid(tokens: int, experts: int, data: st.DataObject, seed: int, normalize: bool) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build(experts, k, {"kind": "sigmoid", "normalize": normalize, "scale": 2.5}, seed)
    moe.router.bias.normal_(std=0.5)
    bias = moe.router.bias.double()
    compare(
        moe,
        torch.randn(tokens, DIM),
        context(tokens),
        lambda x, p: (oracle.sigmoid(x, p["weight"], bias, k, normalize, 2.5), []),
        ("importance",),
    )


@settings(max_examples=25, deadline=None)
@given(**SIZES)
def test_noisy_topk(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build(experts, k, {"kind": "noisy_topk"}, seed)
    about = context(tokens, seed)
    draws = rng.normal(about.rng_keys_N, experts, 1).double()
    compare(
        moe,
        torch.randn(tokens, DIM),
        about,
        lambda x, p: oracle.noisy_topk(x, p["weight"], p["noise_weight"], draws, k),
        ("importance", "load"),
    )


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 7), groups=st.integers(1, 3), size=st.integers(1, 3), data=st.data(), seed=st.integers(0, 99))
def test_hierarchical(tokens: int, groups: int, size: int, data: st.DataObject, seed: int) -> None:
    group_k, inner_k = data.draw(st.integers(1, groups)), data.draw(st.integers(1, size))
    router = {"kind": "hierarchical", "groups": groups, "group_k": group_k}
    moe = build(groups * size, group_k * inner_k, router, seed)
    about = context(tokens, seed)
    draws = rng.normal(about.rng_keys_N, groups + groups * size, 1).double()
    compare(
        moe,
        torch.randn(tokens, DIM),
        about,
        lambda x, p: oracle.hierarchical(
            x,
            (p["group_weight"], p["group_noise_weight"], draws[:, :groups]),
            (p["weight"], p["noise_weight"], draws[:, groups:]),
            group_k,
            inner_k,
        ),
        ("importance", "load"),
    )


@settings(max_examples=20, deadline=None)
@given(**SIZES)
def test_expert_choice(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build(experts, k, {"kind": "expert_choice"}, seed)
    capacity = min(tokens, max(1, round(tokens * k / experts)))
    routing = compare(
        moe,
        torch.randn(tokens, DIM),
        context(tokens),
        lambda x, p: (oracle.expert_choice(x, p["weight"], capacity), []),
        ("importance",),
    )
    assert routing.chosen_NK.sum(dim=0).tolist() == [capacity] * experts


def test_padding_takes_no_place_with_an_expert_that_chooses() -> None:
    moe = build(3, 1, {"kind": "expert_choice"})
    valid = torch.tensor([True, False, True, True, False, True, True, True])
    x = torch.randn(8, DIM)
    padded = moe(x[None], context(8, valid=valid))[0][0, valid]
    torch.testing.assert_close(padded, moe(x[None, valid], context(6))[0][0])


@pytest.mark.parametrize("kind", ["noisy_topk", "hierarchical"])
def test_without_noise_the_gate_is_clean_and_estimates_no_load(kind: str) -> None:
    router = {"kind": kind} | ({"groups": 2, "group_k": 1} if kind == "hierarchical" else {})
    moe = build(4, 1, router).eval()
    x = torch.randn(1, 7, DIM)
    first, routing = moe(x, context(7, seed=0))
    assert torch.equal(first, moe(x, context(7, seed=1))[0])
    assert routing.smooth is None
    noisy = moe.train()(x, context(7, seed=0))[1]
    assert not torch.equal(noisy.gates_NK * noisy.experts_NK, routing.gates_NK * routing.experts_NK)


@pytest.mark.parametrize("kind", ["noisy_topk", "hierarchical"])
def test_the_gates_of_2017_start_at_zero(kind: str) -> None:
    from moelm.model import build_model

    router = {"kind": kind} | ({"groups": 2, "group_k": 1} if kind == "hierarchical" else {})
    ffn = {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 2, "router": router}
    config = ModelConfig.model_validate({"dim": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 9, "ffn": ffn})
    moe = build_model(config, 0).layers[0].ffn
    assert all((parameter == 0).all() for parameter in moe.router.parameters())
    assert all((parameter != 0).any() for parameter in moe.experts.parameters())


def test_the_load_estimate_is_the_share_of_draws_that_choose() -> None:
    moe = build(5, 2, {"kind": "noisy_topk"}, seed=4)
    x = torch.randn(1, DIM).expand(40_000, DIM)
    _, routing = moe(x[None], context(40_000))
    empirical = torch.bincount(routing.experts_NK.flatten(), minlength=5) / len(x)
    torch.testing.assert_close(routing.smooth.experts_NE.mean(dim=0), empirical, atol=0.01, rtol=0)
    assert empirical.std() > 0.05  # a flat load would prove nothing


def test_the_hierarchical_load_estimate_is_the_share_of_draws_that_choose() -> None:
    moe = build(6, 2, {"kind": "hierarchical", "groups": 3, "group_k": 2}, seed=3)
    x = torch.randn(1, DIM).expand(40_000, DIM)
    _, routing = moe(x[None], context(40_000))
    sums = balance.routing_sums(routing, torch.ones(len(x), dtype=torch.bool))
    torch.testing.assert_close(balance.smooth_load(sums) / len(x), sums["counts"] / len(x), atol=0.01, rtol=0)


@pytest.mark.parametrize("router", [{"kind": "topk"}, {"kind": "sigmoid"}, {"kind": "noisy_topk"}])
def test_ties_still_choose_k_different_experts(router: dict[str, Any]) -> None:
    moe = build(5, 3, router).eval()
    torch.nn.init.zeros_(moe.router.weight)
    _, routing = moe(torch.randn(1, 8, DIM), context(8))
    assert all(len(set(row)) == 3 for row in routing.experts_NK.tolist())
    torch.testing.assert_close(routing.gates_NK, torch.full((8, 3), 1 / 3))


def test_a_hash_sees_the_token_alone() -> None:
    moe = build(8, 2, {"kind": "hash"})
    tokens = torch.tensor([3, 7, 3, 900, 7])
    about = [TokenContext(tokens, rng.token_keys(torch.tensor([seed]), torch.arange(5)[None])[0]) for seed in (0, 1)]
    first, second = (moe(torch.randn(1, 5, DIM), each)[1].experts_NK for each in about)
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[2])
    many = TokenContext(torch.arange(8_000), torch.zeros(8_000, dtype=torch.int64))
    counts = torch.bincount(moe.router(torch.zeros(8_000, DIM), many).experts_NK.flatten())
    assert 0.9 * 2_000 < counts.min() <= counts.max() < 1.1 * 2_000


def test_random_draws_anew_each_step_and_the_same_when_asked_again() -> None:
    moe = build(8, 2, {"kind": "random"})
    x = torch.randn(1, 50, DIM)
    first, again, other = (moe(x, context(50, seed))[1].experts_NK for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
