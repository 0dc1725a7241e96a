"""Every router against the equations of its paper: values, gradients and edge cases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model import build_model, rng
from moelm.model.moe import balance
from moelm.model.moe.layer import MoELayer
from moelm.model.moe.router import Routing, TokenContext, softmax_over_experts, top_experts
from tests.model import oracle
from tests.tolerance import assert_close

DIM, HIDDEN = 6, 5


def build_layer(experts: int, k: int, router: dict[str, Any], seed: int = 0, **ffn: Any) -> MoELayer:
    """A layer with normal weights; the seed also determines random inputs that follow."""
    tree = {"kind": "moe", "hidden_dim": HIDDEN, "num_experts": experts, "top_k": k, "router": router, **ffn}
    config = ModelConfig.model_validate({"dim": DIM, "num_layers": 1, "num_heads": 1, "ffn": tree})
    moe = MoELayer(config, config.ffn, layer=1)
    torch.manual_seed(seed)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return moe


def token_context(tokens: int, seed: int = 0, valid: Tensor | None = None) -> TokenContext:
    """The context of one row of tokens."""
    keys = rng.token_keys(rng.row_keys(seed, 3, torch.tensor([5])), torch.arange(tokens)[None])[0]
    return TokenContext(torch.arange(tokens), keys, valid)


def check_layer(moe: MoELayer, x: Tensor, context: TokenContext, gates_of: Any, losses: tuple[str, ...] = ()) -> Routing:
    """Compare outputs, losses and all gradients of the layer with `gates_of(x, parameters)` and the oracle in float64.

    The objective is a random projection of the outputs plus the named balance losses.
    """
    x = x.requires_grad_()
    y, routing = moe(x[None], context)
    projection = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    sums = balance.routing_sums(routing, torch.ones(len(x), dtype=torch.bool))
    total = (y[0] * projection).sum().double()
    for name in losses:
        total = total + {"importance": balance.importance_loss, "load": balance.load_loss}[name](sums)
    total.backward()

    doubles = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    gates, load = gates_of(x64, {name.removeprefix("router."): p for name, p in doubles.items()})
    expected = oracle.mixture(x64, gates, *(doubles[f"experts.w{i}"] for i in (1, 2, 3)))
    expected_total = (expected * projection.double()).sum()
    for name in losses:
        amounts = oracle.importance(gates) if name == "importance" else load
        expected_total = expected_total + oracle.squared_variation(amounts)
    expected_total.backward()

    assert_close(y[0], expected)
    assert_close(total, expected_total, dtype=torch.float32, scale=float(expected.detach().abs().max()) * len(x))
    grads = {"x": (x.grad, x64.grad)} | {name: (p.grad, doubles[name].grad) for name, p in moe.named_parameters()}
    scale = max(float(wanted.abs().max()) for _, wanted in grads.values() if wanted is not None)
    for found, wanted in grads.values():
        assert_close(found, torch.zeros_like(found) if wanted is None else wanted, scale=scale)
    return routing


SIZES = {"tokens": st.integers(1, 9), "experts": st.integers(1, 6), "data": st.data(), "seed": st.integers(0, 99)}
# Always the same examples: a random one could be a near tie, whose float32 logits choose another expert than float64 ones.
examples = settings(max_examples=25, deadline=None, derandomize=True)


@examples
@given(**SIZES, normalize=st.booleans())
def test_topk(tokens: int, experts: int, data: st.DataObject, seed: int, normalize: bool) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build_layer(experts, k, {"kind": "topk", "normalize": normalize}, seed)
    check_layer(
        moe,
        torch.randn(tokens, DIM),
        token_context(tokens),
        lambda x, p: (oracle.topk(x, p["weight"], k, normalize), []),
    )


@examples
@given(**SIZES, normalize=st.booleans())
def test_topk_with_a_bias(tokens: int, experts: int, data: st.DataObject, seed: int, normalize: bool) -> None:
    k = data.draw(st.integers(1, experts))
    router = {"kind": "topk", "normalize": normalize}
    moe = build_layer(experts, k, router, seed, balance={"bias": 0.01})
    moe.router.bias.normal_(std=0.3)
    bias = moe.router.bias.double()
    check_layer(
        moe,
        torch.randn(tokens, DIM),
        token_context(tokens),
        lambda x, p: (oracle.biased_topk(x, p["weight"], bias, k, normalize), []),
        ("importance",),
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_a_bias_of_zero_changes_no_bit(normalize: bool) -> None:
    """Also not where different logits have equal probabilities: near each other, or so far apart that both are zero."""
    router = {"kind": "topk", "normalize": normalize}
    plain, biased = (build_layer(8, 4, router, balance={"bias": rate}) for rate in (0.0, 0.01))
    assert plain.router.bias is None
    assert "router.bias" not in plain.state_dict()
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500, DIM) * scale for scale in (1e-7, 1.0, 1e3)])
    probs_NE = plain.router(x, token_context(len(x))).probs_NE
    assert (probs_NE == 0).sum(dim=-1).max() > 4
    assert any(row.unique().numel() < 8 for row in probs_NE[:500])
    results = []
    for moe in (plain, biased):
        inputs = x.clone().requires_grad_()
        y, routing = moe(inputs[None], token_context(len(x)))
        y.square().mean().backward()
        results.append([y, routing.gates_NK, routing.experts_NK, routing.probs_NE, inputs.grad, moe.router.weight.grad])
    for without, with_bias in zip(*results, strict=True):
        assert torch.equal(without, with_bias)


@examples
@given(**SIZES, normalize=st.booleans())
def test_sigmoid(tokens: int, experts: int, data: st.DataObject, seed: int, normalize: bool) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build_layer(experts, k, {"kind": "sigmoid", "normalize": normalize, "scale": 2.5}, seed)
    moe.router.bias.normal_(std=0.5)
    bias = moe.router.bias.double()
    check_layer(
        moe,
        torch.randn(tokens, DIM),
        token_context(tokens),
        lambda x, p: (oracle.sigmoid(x, p["weight"], bias, k, normalize, 2.5), []),
        ("importance",),
    )


@examples
@given(**SIZES)
def test_noisy_topk(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build_layer(experts, k, {"kind": "noisy_topk"}, seed)
    context = token_context(tokens, seed)
    noise = rng.normal(context.rng_keys_N, experts, torch.tensor(1)).double()
    check_layer(
        moe,
        torch.randn(tokens, DIM),
        context,
        lambda x, p: oracle.noisy_topk(x, p["weight"], p["noise_weight"], noise, k),
        ("importance", "load"),
    )


@examples
@given(tokens=st.integers(1, 7), groups=st.integers(1, 3), size=st.integers(1, 3), data=st.data(), seed=st.integers(0, 99))
def test_hierarchical(tokens: int, groups: int, size: int, data: st.DataObject, seed: int) -> None:
    group_k, inner_k = data.draw(st.integers(1, groups)), data.draw(st.integers(1, size))
    router = {"kind": "hierarchical", "groups": groups, "group_k": group_k}
    moe = build_layer(groups * size, group_k * inner_k, router, seed)
    context = token_context(tokens, seed)
    noise = rng.normal(context.rng_keys_N, groups + groups * size, torch.tensor(1)).double()
    check_layer(
        moe,
        torch.randn(tokens, DIM),
        context,
        lambda x, p: oracle.hierarchical(
            x,
            (p["group_weight"], p["group_noise_weight"], noise[:, :groups]),
            (p["weight"], p["noise_weight"], noise[:, groups:]),
            group_k,
            inner_k,
        ),
        ("importance", "load"),
    )


@examples
@given(**SIZES)
def test_expert_choice(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts))
    moe = build_layer(experts, k, {"kind": "expert_choice"}, seed)
    capacity = min(tokens, max(1, round(tokens * k / experts)))
    routing = check_layer(
        moe,
        torch.randn(tokens, DIM),
        token_context(tokens),
        lambda x, p: (oracle.expert_choice(x, p["weight"], capacity), []),
        ("importance",),
    )
    assert routing.chosen_NK.sum(dim=0).tolist() == [capacity] * experts


def test_expert_choice_does_not_select_padding() -> None:
    moe = build_layer(3, 1, {"kind": "expert_choice"})
    valid = torch.tensor([True, False, True, True, False, True, True, True])
    x = torch.randn(8, DIM)
    padded = moe(x[None], token_context(8, valid=valid))[0][0, valid]
    assert_close(padded, moe(x[None, valid], token_context(6))[0][0])


def noisy_router(kind: str) -> dict[str, Any]:
    """The config of a router for four experts."""
    return {"kind": kind} | ({"groups": 2, "group_k": 1} if kind == "hierarchical" else {})


@pytest.mark.parametrize("kind", ["noisy_topk", "hierarchical"])
def test_evaluation_has_no_noise_and_no_load_estimate(kind: str) -> None:
    moe = build_layer(4, 1, noisy_router(kind)).eval()
    x = torch.randn(1, 7, DIM)
    first, routing = moe(x, token_context(7, seed=0))
    assert torch.equal(first, moe(x, token_context(7, seed=1))[0])
    assert routing.smooth is None
    noisy = moe.train()(x, token_context(7, seed=0))[1]
    assert not torch.equal(noisy.gates_NK * noisy.experts_NK, routing.gates_NK * routing.experts_NK)


@pytest.mark.parametrize("kind", ["noisy_topk", "hierarchical"])
def test_noisy_routers_start_at_zero(kind: str) -> None:
    ffn = {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 2, "router": noisy_router(kind)}
    config = ModelConfig.model_validate({"dim": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 9, "ffn": ffn})
    moe = build_model(config, 0).layers[0].ffn
    assert all((parameter == 0).all() for parameter in moe.router.parameters())
    assert all((parameter != 0).any() for parameter in moe.experts.parameters())


TRIALS = 40_000
FOUR_STANDARD_ERRORS = 4 * 0.5 / TRIALS**0.5
"""Of a frequency; its standard deviation is at most 0.5 a trial."""


def test_the_load_estimate_equals_the_frequency_of_selection() -> None:
    moe = build_layer(5, 2, {"kind": "noisy_topk"}, seed=4)
    x = torch.randn(1, DIM).expand(TRIALS, DIM)
    _, routing = moe(x[None], token_context(TRIALS))
    frequency = torch.bincount(routing.experts_NK.flatten(), minlength=5) / TRIALS
    assert (routing.smooth.experts_NE.mean(dim=0) - frequency).abs().max() < FOUR_STANDARD_ERRORS
    assert frequency.std() > 5 * FOUR_STANDARD_ERRORS  # a uniform load would prove nothing


def test_the_hierarchical_load_estimate_equals_the_frequency_of_selection() -> None:
    moe = build_layer(6, 2, {"kind": "hierarchical", "groups": 3, "group_k": 2}, seed=3)
    x = torch.randn(1, DIM).expand(TRIALS, DIM)
    _, routing = moe(x[None], token_context(TRIALS))
    sums = balance.routing_sums(routing, torch.ones(TRIALS, dtype=torch.bool))
    assert (balance.smooth_load(sums) - sums["counts"]).abs().max() / TRIALS < FOUR_STANDARD_ERRORS


@pytest.mark.parametrize("router", [{"kind": "topk"}, {"kind": "sigmoid"}, {"kind": "noisy_topk"}])
def test_ties_still_select_k_different_experts(router: dict[str, Any]) -> None:
    moe = build_layer(5, 3, router).eval()
    torch.nn.init.zeros_(moe.router.weight)
    _, routing = moe(torch.randn(1, 8, DIM), token_context(8))
    assert all(len(set(row)) == 3 for row in routing.experts_NK.tolist())
    assert_close(routing.gates_NK, torch.full((8, 3), 1 / 3))


def test_a_hash_router_depends_on_the_token_alone() -> None:
    moe = build_layer(8, 2, {"kind": "hash"})
    tokens = torch.tensor([3, 7, 3, 900, 7])
    contexts = [TokenContext(tokens, rng.token_keys(torch.tensor([seed]), torch.arange(5)[None])[0]) for seed in (0, 1)]
    first, second = (moe(torch.randn(1, 5, DIM), context)[1].experts_NK for context in contexts)
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[2])
    many = TokenContext(torch.arange(8_000), torch.zeros(8_000, dtype=torch.int64))
    counts = torch.bincount(moe.router(torch.zeros(8_000, DIM), many).experts_NK.flatten())
    assert 0.9 * 2_000 < counts.min() <= counts.max() < 1.1 * 2_000


def test_a_random_router_changes_with_the_seed_alone() -> None:
    moe = build_layer(8, 2, {"kind": "random"})
    x = torch.randn(1, 50, DIM)
    first, again, other = (moe(x, token_context(50, seed))[1].experts_NK for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
def test_the_top_experts_are_those_of_torch_topk(top_k: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(500, 7)
    before = scores.clone()
    assert torch.equal(top_experts(scores, top_k), scores.topk(top_k, dim=-1).indices)
    assert torch.equal(scores, before)
    # Of equal scores, different experts.
    assert all(len(set(row)) == top_k for row in top_experts(torch.zeros(3, 7), top_k).tolist())


@pytest.mark.parametrize("num_experts", [2, 8, 32])
def test_the_softmax_over_experts_is_that_of_the_last_dimension(num_experts: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, num_experts, requires_grad=True)
    upstream = torch.randn(50, num_experts)
    found, expected = softmax_over_experts(logits), logits.softmax(dim=-1)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(probs, logits, upstream)[0] for probs in (found, expected)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["noisy_topk", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("random", "hash", "hierarchical"))],
)
def test_all_layers_share_the_graphs_of_a_compiled_block(kind: str) -> None:
    """Compiled block by block, more layers are no more graphs."""
    options = {"groups": 2, "group_k": 1} if kind == "hierarchical" else {}
    ffn = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2, "router": {"kind": kind, **options}}
    shape = {"dim": 16, "num_heads": 2, "vocab_size": 50, "ffn": ffn}
    graphs = []
    for layers in (2, 10):
        torch._dynamo.reset()
        compiled = 0

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            nonlocal compiled
            compiled += 1
            return graph.forward

        model = build_model(ModelConfig.model_validate({**shape, "num_layers": layers}), 0)
        for block in model.blocks:
            block.compile(backend=backend)
        tokens = torch.arange(32).view(2, 16)
        model(tokens, rng_keys_B=torch.arange(2), targets_BT=tokens)
        graphs.append(compiled)
    assert graphs[0] == graphs[1] > 0
