"""Balance losses against loops over tokens, and their indifference to how a batch is cut."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import BalanceConfig, ModelConfig
from moelm.data.loader import IGNORE, Batch
from moelm.model import build_model, rng
from moelm.model.moe import balance
from moelm.model.moe.balance import add_layer_sums, routing_sums
from moelm.model.moe.router import Routing
from moelm.train.objective import balance_loss, layer_sums
from moelm.train.routing_metrics import RoutingStatistics
from tests.model import oracle


def routing(logits: Tensor, k: int) -> Routing:
    top, chosen = logits.topk(k)
    return Routing(top.softmax(dim=-1), chosen, logits.softmax(dim=-1), logits)


def test_losses_match_loops_and_leave_padding_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 5)
    valid = torch.rand(20) > 0.3
    kept = logits[valid].double().requires_grad_()
    ours = logits.clone().requires_grad_()
    sums = routing_sums(routing(ours, 2), valid)
    gates = [oracle.keep_top_k(list(row), 2) for row in kept]
    z = sum(sum(value.exp() for value in row).log() ** 2 for row in kept) / len(kept)
    expected = {
        "aux": oracle.switch_loss(kept, 2),
        "z": z,
        "importance": oracle.squared_variation(oracle.importance(gates)),
    }
    found = {
        "aux": balance.aux_loss(sums),
        "z": balance.z_loss(sums),
        "importance": balance.importance_loss(sums),
    }
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss.detach(), rtol=1e-5, atol=1e-6)
        (mine,) = torch.autograd.grad(found[name], ours, retain_graph=True)
        (theirs,) = torch.autograd.grad(loss, kept, retain_graph=True)
        torch.testing.assert_close(mine[valid].double(), theirs, rtol=1e-4, atol=1e-6)
        assert mine[~valid].abs().max() == 0


def test_the_balanced_values_are_one_and_zero() -> None:
    for k in (1, 2, 4):
        logits = torch.full((8, 4), -1.0)
        for n in range(8):
            logits[n, [(n + j) % 4 for j in range(k)]] = 1.0
        sums = routing_sums(routing(logits, k), torch.ones(8, dtype=torch.bool))
        assert math.isclose(balance.aux_loss(sums).item(), 1.0, rel_tol=1e-6)
        assert balance.importance_loss(sums).item() < 1e-12


def test_the_sequence_loss_is_the_mean_of_each_sequence_alone() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 6, 5, requires_grad=True)
    valid = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 6], dtype=torch.bool)
    found = balance.sequence_aux_loss(routing(logits.flatten(0, 1), 2), valid)
    expected = sum(oracle.switch_loss(logits[b, valid[b]].double(), 2) * int(valid[b].sum()) for b in (0, 1)) / 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (mine,), (theirs,) = (torch.autograd.grad(loss, logits) for loss in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


ROUTERS = {
    "topk": ({"kind": "topk"}, {"aux": 0.5, "z": 0.1, "importance": 0.3}),
    "sequence": ({"kind": "topk"}, {"aux": 0.5, "z": 0.1, "scope": "sequence"}),
    "noisy": ({"kind": "noisy_topk"}, {"importance": 0.3, "load": 0.7}),
    "hierarchical": ({"kind": "hierarchical", "groups": 2, "group_k": 1}, {"importance": 0.3, "load": 0.7, "aux": 0.2}),
    "sigmoid": ({"kind": "sigmoid"}, {"aux": 0.5, "bias": 0.01}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_cutting_a_batch_changes_neither_loss_nor_gradient(name: str) -> None:
    router, weights = ROUTERS[name]
    ffn: dict[str, Any] = {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 2, "router": router}
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 30, "ffn": ffn}
    config = BalanceConfig(**weights)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (4, 6), generator=generator)
    targets = torch.where(torch.rand(4, 6, generator=generator) > 0.2, 1, IGNORE)
    rows = rng.row_keys(0, 0, torch.arange(4))
    total = float((targets != IGNORE).sum())
    results = []
    for parts in (1, 2, 4):
        model = build_model(ModelConfig.model_validate(shape), seed=0).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        batches = [Batch(*cut) for cut in zip(tokens.chunk(parts), targets.chunk(parts), tokens.chunk(parts), strict=True)]

        def forward(batch: Batch, draws: Tensor, model: Any = model) -> Any:
            routings = model(batch.tokens_BT, valid_BT=batch.valid_BT, rng_keys_B=draws).routings
            return routings, layer_sums(routings, batch)

        cuts = list(zip(batches, rows.chunk(parts), strict=True))
        whole = add_layer_sums(forward(*cut)[1] for cut in cuts) if parts > 1 and config.needs_whole_batch else None
        statistics = RoutingStatistics()
        for batch, draws in cuts:
            routings, own = forward(batch, draws)
            loss, layers = balance_loss(routings, own, whole, batch, total, config)
            statistics.add(own, layers)
            loss.backward()
        results.append((statistics.as_metrics(), [p.grad for p in model.parameters()]))
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in results[0][1])
    for metrics, grads in results[1:]:
        for key, value in results[0][0].items():
            if key != "moe/layers":
                assert math.isclose(metrics[key], value, rel_tol=1e-5, abs_tol=1e-7), key
        for mine, theirs in zip(grads, results[0][1], strict=True):
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_bias_moves_against_the_load_and_stays_out_of_the_gates() -> None:
    step = balance.expert_bias_delta(torch.tensor([10.0, 2.0, 6.0]), 0.01)
    torch.testing.assert_close(step, torch.tensor([-0.01, 0.01, 0.0]))
    ffn = {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 1, "router": {"kind": "sigmoid"}}
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 30, "ffn": ffn}
    model = build_model(ModelConfig.model_validate(shape), seed=0)
    tokens = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    assert model.config.ffn.balance.bias == 0.001

    def worst() -> float:
        counts = {
            layer: torch.bincount(route.experts_NK.flatten(), minlength=4).double()
            for layer, route in model(tokens).routings.items()
        }
        model.update_expert_bias(counts)
        return max(float(count.max() / count.mean()) for count in counts.values())

    first = worst()
    last = [worst() for _ in range(300)][-1]
    assert last < first
    route = model(tokens).routings[0]
    torch.testing.assert_close(route.gates_NK, torch.ones(16, 1))  # normalised over one choice, whatever its bias
