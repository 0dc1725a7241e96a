"""Two forms of depth: layers inside a feed-forward block, and layers that repeat."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model import build_model
from moelm.model.moe.router import TokenContext
from tests.model.test_transformer import MOE, model_config, train_losses
from tests.tolerance import assert_close


def deep_block(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, depth: int) -> Tensor:
    """One token through one block; y is the sum of the layers so far."""
    units_per_layer = len(w1) // depth
    y = torch.zeros_like(x)
    for start in range(0, len(w1), units_per_layer):
        units = slice(start, start + units_per_layer)
        hidden = F.silu(w1[units] @ (x + y)) * (w3[units] @ (x + y))
        y = y + w2[:, units] @ hidden
    return y


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("shared", [0, 1])
def test_deep_experts_equal_a_loop_over_tokens(depth: int, shared: int) -> None:
    config = model_config(num_layers=1, init_std=0.3, ffn={**MOE, "depth": depth, "shared_experts": shared})
    moe = build_model(config, seed=0).double().layers[0].ffn
    torch.manual_seed(0)
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    y, routing = moe(x, TokenContext(torch.arange(9), torch.arange(0)))
    experts = moe.experts
    expected = torch.stack(
        [
            sum(
                gate * deep_block(token, experts.w1[e], experts.w2[e], experts.w3[e], depth)
                for gate, e in zip(routing.gates_NK[n], routing.experts_NK[n].tolist(), strict=True)
            )
            + (deep_block(token, moe.shared.w1, moe.shared.w2, moe.shared.w3, depth) if shared else 0)
            for n, token in enumerate(x[0])
        ]
    )
    assert_close(y[0], expected)
    inputs = [x, *moe.parameters()]
    upstream = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(output, inputs, upstream, retain_graph=True) for output in (y[0], expected))
    for grad, expected_grad in zip(found, wanted, strict=True):
        assert_close(grad, expected_grad)


def test_a_deep_block_differs_from_a_wide_one() -> None:
    models = [build_model(model_config(init_std=0.3, ffn={**MOE, "depth": depth}), seed=0) for depth in (1, 2)]
    wide, deep = (model(torch.arange(8)[None]).logits for model in models)
    assert not torch.allclose(wide, deep, rtol=1e-2)


def test_one_deep_expert_is_bitwise_equal_to_the_deep_dense_model() -> None:
    sparse = train_losses({"kind": "moe", "hidden_dim": 48, "num_experts": 1, "top_k": 1, "depth": 3}, "adamw")
    assert sparse == train_losses({"kind": "dense", "hidden_dim": 48, "depth": 3}, "adamw")


def unrolled(config: ModelConfig) -> ModelConfig:
    """The config with own weights for every layer."""
    return config.model_copy(update={"unique_layers": None})


@pytest.mark.parametrize("ffn", [MOE, {**MOE, "every": 2}, {"kind": "dense", "hidden_dim": 24}])
def test_repeated_layers_equal_copies_whose_gradients_are_summed(ffn: dict[str, Any]) -> None:
    config = model_config(num_layers=6, unique_layers=2, ffn=ffn)
    looped, whole = build_model(config, seed=0), build_model(unrolled(config), seed=0)
    for number, layer in enumerate(whole.layers):
        layer.load_state_dict(looped.layers[number % 2].state_dict())
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = [model(tokens) for model in (looped, whole)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert outputs[0].routings.keys() == outputs[1].routings.keys() == set(config.sparse_layers)
    for output in outputs:
        output.logits.square().mean().backward()
    for name, weight in looped.layers.named_parameters():
        number, _, rest = name.partition(".")
        copies = [whole.layers[layer].get_parameter(rest).grad for layer in range(int(number), 6, 2)]
        if weight.grad is None:
            assert copies == [None] * 3
        else:
            assert_close(weight.grad, sum(copies))


@pytest.mark.parametrize("kind", ["topk", "sigmoid"])
def test_a_bias_is_updated_by_the_load_of_all_repeats(kind: str) -> None:
    ffn = {**MOE, "router": {"kind": kind}, "balance": {"bias": 0.01}}
    model = build_model(model_config(num_layers=4, unique_layers=2, ffn=ffn), seed=0)
    counts = {0: [9, 1, 5, 5], 1: [5, 5, 5, 5], 2: [0, 10, 5, 5], 3: [6, 4, 5, 5]}
    model.update_expert_bias({layer: torch.tensor(each, dtype=torch.float32) for layer, each in counts.items()})
    first, second = (model.get_buffer(f"layers.{layer}.ffn.router.bias").sign().tolist() for layer in (0, 1))
    assert first == [1, -1, 0, 0]
    assert second == [-1, 1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": {**MOE, "depth": 3}}, "depth is 3, which does not divide hidden_dim = 16"),
        ({"num_layers": 4, "unique_layers": 3}, "unique_layers is 3, which does not divide num_layers = 4"),
        ({"num_layers": 6, "unique_layers": 3, "ffn": {**MOE, "every": 2}}, "which ffn.every = 2 does not divide"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(**changes)


@pytest.mark.parametrize("kind", ["random", "hash"])
def test_fixed_routers_select_other_experts_at_each_repeat(kind: str) -> None:
    model = build_model(model_config(num_layers=2, unique_layers=1, ffn={**MOE, "router": {"kind": kind}}), seed=0).eval()
    routings = model(torch.arange(40)[None]).routings
    assert not torch.equal(routings[0].experts_NK, routings[1].experts_NK)
