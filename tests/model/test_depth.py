"""Depth in two ways: hidden layers inside a block, against a loop over tokens; and layers that repeat, against copies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model import build_model
from moelm.model.moe.router import TokenContext
from tests.model.test_transformer import MOE, shape, train_losses


def deep_block(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, depth: int) -> Tensor:
    """One token through one block: y is what the layers so far have added."""
    part = len(w1) // depth
    y = torch.zeros_like(x)
    for start in range(0, len(w1), part):
        units = slice(start, start + part)
        hidden = F.silu(w1[units] @ (x + y)) * (w3[units] @ (x + y))
        y = y + w2[:, units] @ hidden
    return y


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("shared", [0, 1])
def test_deep_experts_are_the_loop_over_tokens(depth: int, shared: int) -> None:
    config = shape(num_layers=1, init_std=0.3, ffn={**MOE, "depth": depth, "shared_experts": shared})
    moe = build_model(config, seed=0).double().layers[0].ffn
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    y, routing = moe(x, TokenContext(torch.arange(9), torch.arange(0)))
    experts = moe.experts
    meant = torch.stack(
        [
            sum(
                gate * deep_block(token, experts.w1[e], experts.w2[e], experts.w3[e], depth)
                for gate, e in zip(routing.gates_NK[n], routing.experts_NK[n].tolist(), strict=True)
            )
            + (deep_block(token, moe.shared.w1, moe.shared.w2, moe.shared.w3, depth) if shared else 0)
            for n, token in enumerate(x[0])
        ]
    )
    torch.testing.assert_close(y[0], meant, rtol=1e-6, atol=1e-8)
    learned = [x, *moe.parameters()]
    pull = torch.randn_like(meant)
    for found, its in zip(
        torch.autograd.grad(y[0], learned, pull, retain_graph=True), torch.autograd.grad(meant, learned, pull), strict=True
    ):
        torch.testing.assert_close(found, its, rtol=1e-6, atol=1e-8)


def test_a_deep_block_is_no_wide_one() -> None:
    blocks = [build_model(shape(init_std=0.3, ffn={**MOE, "depth": depth}), seed=0) for depth in (1, 2)]
    wide, deep = (model(torch.arange(8)[None]).logits for model in blocks)
    assert not torch.allclose(wide, deep, rtol=1e-2)


def test_a_mixture_of_one_deep_expert_is_the_deep_dense_model() -> None:
    sparse = train_losses({"kind": "moe", "hidden_dim": 48, "num_experts": 1, "top_k": 1, "depth": 3})
    assert sparse == train_losses({"kind": "dense", "hidden_dim": 48, "depth": 3})


def unrolled(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"unique_layers": None})


@pytest.mark.parametrize("ffn", [MOE, {**MOE, "every": 2}, {"kind": "dense", "hidden_dim": 24}])
def test_repeated_layers_are_copies_whose_gradients_add_up(ffn: dict[str, Any]) -> None:
    config = shape(num_layers=6, unique_layers=2, ffn=ffn)
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
        copies = [whole.layers[at].get_parameter(rest).grad for at in range(int(number), 6, 2)]
        if weight.grad is None:
            assert copies == [None] * 3
        else:
            torch.testing.assert_close(weight.grad, sum(copies), rtol=1e-4, atol=1e-7)


def test_a_bias_moves_by_all_visits_of_its_layer() -> None:
    model = build_model(shape(num_layers=4, unique_layers=2, ffn={**MOE, "router": {"kind": "sigmoid"}}), seed=0)
    counts = {0: [9, 1, 5, 5], 1: [5, 5, 5, 5], 2: [0, 10, 5, 5], 3: [6, 4, 5, 5]}
    model.update_expert_bias({layer: torch.tensor(each, dtype=torch.float32) for layer, each in counts.items()})
    first, second = (model.get_buffer(f"layers.{layer}.ffn.router.bias").sign().tolist() for layer in (0, 1))
    assert first == [1, -1, 0, 0]
    assert second == [-1, 1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ffn": {**MOE, "depth": 3}}, "depth is 3, which does not divide hidden_dim = 16"),
        ({"num_layers": 4, "unique_layers": 3}, "unique_layers is 3, which does not divide num_layers = 4"),
        ({"num_layers": 6, "unique_layers": 3, "ffn": {**MOE, "every": 2}}, "which ffn.every = 2 does not divide"),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        shape(**changes)


@pytest.mark.parametrize("kind", ["random", "hash"])
def test_what_is_drawn_is_drawn_anew_at_each_visit(kind: str) -> None:
    model = build_model(shape(num_layers=2, unique_layers=1, ffn={**MOE, "router": {"kind": kind}}), seed=0).eval()
    routings = model(torch.arange(40)[None]).routings
    assert not torch.equal(routings[0].experts_NK, routings[1].experts_NK)
