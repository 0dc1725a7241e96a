"""Balance losses against loops over tokens, and their independence of how a batch is divided."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import BalanceConfig, ModelConfig
from moelm.data.loader import IGNORE, Batch
from moelm.distributed.ranks import copy_to_host
from moelm.model import build_model, rng
from moelm.model.moe import balance
from moelm.model.moe.balance import LayerSums, add_layer_sums, map_layer_sums, routing_sums
from moelm.model.moe.router import Routing, TokenContext
from moelm.train.objective import balance_loss, layer_sums
from moelm.train.routing_metrics import add_statistics, routing_metrics
from tests.model import oracle
from tests.tolerance import assert_close


def topk_routing(logits: Tensor, k: int) -> Routing:
    top, chosen = logits.topk(k)
    return Routing(top.softmax(dim=-1), chosen, logits.softmax(dim=-1), logits)


def test_losses_equal_loops_without_padding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 5, requires_grad=True)
    valid = torch.rand(20) > 0.3
    valid_logits = logits.detach()[valid].double().requires_grad_()
    sums = routing_sums(topk_routing(logits, 2), valid)
    gates = [oracle.keep_top_k(list(row), 2) for row in valid_logits]
    expected = {
        "aux": oracle.switch_loss(valid_logits, 2),
        "z": sum(sum(value.exp() for value in row).log() ** 2 for row in valid_logits) / len(valid_logits),
        "importance": oracle.squared_variation(oracle.importance(gates)),
    }
    found = {
        "aux": balance.aux_loss(sums),
        "z": balance.z_loss(sums),
        "importance": balance.importance_loss(sums),
    }
    for name, loss in expected.items():
        assert_close(found[name], loss, dtype=torch.float32)
        (grad,) = torch.autograd.grad(found[name], logits, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(loss, valid_logits, retain_graph=True)
        assert_close(grad[valid], expected_grad)
        assert grad[~valid].abs().max() == 0


def test_balanced_losses_are_one_and_zero() -> None:
    for k in (1, 2, 4):
        logits = torch.full((8, 4), -1.0)
        for n in range(8):
            logits[n, [(n + j) % 4 for j in range(k)]] = 1.0
        sums = routing_sums(topk_routing(logits, k), torch.ones(8, dtype=torch.bool))
        epsilon = torch.finfo(torch.float32).eps
        assert balance.aux_loss(sums).item() == pytest.approx(1.0, abs=8 * epsilon)
        assert balance.importance_loss(sums).item() < (8 * epsilon) ** 2


def test_the_sequence_loss_is_the_weighted_mean_of_the_sequences() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 6, 5, requires_grad=True)
    valid = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 6], dtype=torch.bool)
    found = balance.sequence_aux_loss(topk_routing(logits.flatten(0, 1), 2), valid)
    expected = sum(oracle.switch_loss(logits[b, valid[b]].double(), 2) * int(valid[b].sum()) for b in (0, 1)) / 10
    assert_close(found, expected, dtype=torch.float32)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, logits) for loss in (found, expected))
    assert_close(grad, expected_grad)


ROUTERS = {
    "topk": ({"kind": "topk"}, {"aux": 0.5, "z": 0.1, "importance": 0.3}),
    "sequence": ({"kind": "topk"}, {"aux": 0.5, "z": 0.1, "scope": "sequence"}),
    "noisy": ({"kind": "noisy_topk"}, {"importance": 0.3, "load": 0.7}),
    "hierarchical": ({"kind": "hierarchical", "groups": 2, "group_k": 1}, {"importance": 0.3, "load": 0.7, "aux": 0.2}),
    "sigmoid": ({"kind": "sigmoid"}, {"aux": 0.5, "bias": 0.01}),
    "topk-bias": ({"kind": "topk"}, {"z": 0.1, "bias": 0.01}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_micro_batches_change_neither_loss_nor_gradient(name: str) -> None:
    router, weights = ROUTERS[name]
    ffn: dict[str, Any] = {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 2, "router": router}
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 30, "ffn": ffn}
    config = BalanceConfig(**weights)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (4, 6), generator=generator)
    targets = torch.where(torch.rand(4, 6, generator=generator) > 0.2, 1, IGNORE)
    rng_keys_B = rng.row_keys(0, 0, torch.arange(4))
    total = float((targets != IGNORE).sum())
    results = []
    for parts in (1, 2, 4):
        model = build_model(ModelConfig.model_validate(shape), seed=0).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        batches = [Batch(*part) for part in zip(*(each.chunk(parts) for each in (tokens, targets, tokens)), strict=True)]

        def forward(batch: Batch, rng_keys_B: Tensor, model: Any = model) -> Any:
            routings = model(batch.tokens_BT, valid_BT=batch.valid_BT, rng_keys_B=rng_keys_B).routings
            return routings, layer_sums(routings, batch)

        inputs = list(zip(batches, rng_keys_B.chunk(parts), strict=True))
        batch_sums = None
        if parts > 1 and config.needs_whole_batch:
            batch_sums = add_layer_sums(forward(*micro_batch)[1] for micro_batch in inputs)
        statistics: LayerSums = {}
        for batch, keys in inputs:
            routings, own = forward(batch, keys)
            loss, layers = balance_loss(routings, own, batch_sums, batch, total, config)
            statistics = add_statistics(statistics, own, layers)
            loss.backward()
        results.append((routing_metrics(map_layer_sums(statistics, copy_to_host)), [p.grad for p in model.parameters()]))
    expected_metrics, expected_grads = results[0]
    assert any(grad is not None and grad.abs().max() > 1e-3 for grad in expected_grads)
    relative = 32 * torch.finfo(torch.float32).eps
    for metrics, grads in results[1:]:
        for key, value in expected_metrics.items():
            if key != "moe/layers":
                assert metrics[key] == pytest.approx(value, rel=relative, abs=relative), key
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            if expected_grad is not None:
                assert_close(grad, expected_grad)


def test_the_update_of_the_bias_equals_a_loop_over_experts() -> None:
    for counts in ([10.0, 2.0, 6.0], [9.0, 1.0, 1.0, 1.0], [3.0, 3.0], [7.0], [0.0, 5.0, 6.0, 7.0, 90.0]):
        mean = sum(counts) / len(counts)
        moves = [0.01 if count < mean else -0.01 if count > mean else 0.0 for count in counts]
        expected = [move - sum(moves) / len(moves) for move in moves]
        delta = balance.expert_bias_delta(torch.tensor(counts, dtype=torch.float64), 0.01)
        assert_close(delta, torch.tensor(expected, dtype=torch.float64), scale=0.01)


@pytest.mark.parametrize("kind", ["topk", "sigmoid"])
def test_the_mean_of_the_bias_stays_zero_and_centering_changes_no_selection(kind: str) -> None:
    steps, rate = 2000, 0.001
    ffn: dict[str, Any] = {"kind": "moe", "hidden_dim": 4, "num_experts": 7, "top_k": 2}
    ffn |= {"router": {"kind": kind}, "balance": {"bias": rate}}
    shape = {"dim": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 9, "init_std": 0.5, "ffn": ffn}
    model = build_model(ModelConfig.model_validate(shape), seed=0)
    router = model.layers[0].ffn.router
    generator = torch.Generator().manual_seed(0)
    uncentered, largest = torch.zeros(7, dtype=torch.float64), 0.0
    for _ in range(steps):
        # One expert has most of the load, so six are below the mean.
        counts = torch.rand(7, generator=generator, dtype=torch.float64)
        counts[int(torch.randint(0, 7, (), generator=generator))] += 50
        model.update_expert_bias({0: counts})
        uncentered += rate * (counts.mean() - counts).sign()
        largest = max(largest, float(router.bias.abs().max()))
    assert uncentered.mean() > 0.7 * steps * rate
    rounding = steps * torch.finfo(torch.float32).eps / 2 * (largest + 2 * rate)  # of the update and of the sum, each step
    assert router.bias.double().mean().abs() < rounding
    assert (router.bias - (uncentered - uncentered.mean())).abs().max() < rounding
    assert rounding < 1e-2 * largest
    x, context = torch.randn(200, 8, generator=generator), TokenContext(torch.arange(200), torch.arange(0))
    centered_NK = router(x, context).experts_NK
    router.bias.zero_()
    assert not torch.equal(router(x, context).experts_NK, centered_NK)
    router.bias += uncentered.float()
    assert torch.equal(router(x, context).experts_NK, centered_NK)


@pytest.mark.parametrize("kind", ["topk", "sigmoid"])
def test_the_bias_moves_against_the_load_and_does_not_affect_gates(kind: str) -> None:
    ffn: dict[str, Any] = {"kind": "moe", "hidden_dim": 8, "num_experts": 4, "top_k": 1}
    ffn |= {"router": {"kind": kind}, "balance": {"bias": 0.001}}
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 30, "ffn": ffn}
    model = build_model(ModelConfig.model_validate(shape), seed=0)
    tokens = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))

    def update_and_measure() -> float:
        """One update of the biases; returns the highest load over the mean before it."""
        counts = {
            layer: torch.bincount(routing.experts_NK.flatten(), minlength=4).double()
            for layer, routing in model(tokens).routings.items()
        }
        model.update_expert_bias(counts)
        return max(float(count.max() / count.mean()) for count in counts.values())

    first = update_and_measure()
    last = [update_and_measure() for _ in range(300)][-1]
    assert last < first
    assert torch.equal(model(tokens).routings[0].gates_NK, torch.ones(16, 1))  # normalized over one choice


def test_the_entropy_equals_torch_s_and_is_zero_for_a_certain_choice() -> None:
    torch.manual_seed(0)
    probs = torch.cat((3 * torch.randn(50, 6), torch.full((1, 6), -1e4).index_fill(1, torch.tensor([2]), 0.0))).softmax(-1)
    assert_close(balance.entropy(probs), torch.special.entr(probs).sum(dim=-1))
    assert balance.entropy(probs)[-1] == 0
