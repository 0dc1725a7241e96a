"""Balance losses against loops over tokens, and their indifference to how a batch is cut."""

import math

import torch

from moelm.config import BalanceConfig
from moelm.data.loader import Batch
from moelm.model import ModelOutput, Routing, balance
from moelm.train.objective import add_counts, balance_loss, count_assignments


def routing(logits: torch.Tensor, k: int) -> Routing:
    top, chosen = logits.topk(k)
    return Routing(logits, top.softmax(dim=-1), chosen)


def test_losses_match_loops_and_leave_padding_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 5)
    valid = torch.rand(20) > 0.3
    route = routing(logits, 2)
    tokens = [n for n in range(20) if valid[n]]
    share, probability, z = [0.0] * 5, [0.0] * 5, 0.0
    for n in tokens:
        values = [math.exp(v) for v in logits[n].tolist()]
        z += math.log(sum(values)) ** 2 / len(tokens)
        for e in sorted(range(5), key=lambda e: -values[e])[:2]:
            share[e] += 1 / (2 * len(tokens))
        for e in range(5):
            probability[e] += values[e] / sum(values) / len(tokens)
    counts = balance.expert_counts(route, valid)
    load = counts / counts.sum()
    assert torch.allclose(load, torch.tensor(share, dtype=torch.float64))
    expected = 5 * sum(f * p for f, p in zip(share, probability, strict=True))
    assert math.isclose(balance.aux_loss(route, valid, load, len(tokens)).item(), expected, rel_tol=1e-5)
    assert math.isclose(balance.z_loss(route, valid, len(tokens)).item(), z, rel_tol=1e-5)


def test_the_balanced_aux_loss_is_one() -> None:
    load = torch.full((4,), 0.25, dtype=torch.float64)
    for k in (1, 2, 4):
        route = routing(torch.zeros(8, 4), k)
        assert math.isclose(balance.aux_loss(route, torch.ones(8, dtype=torch.bool), load, 8).item(), 1.0, rel_tol=1e-6)


def test_cutting_a_batch_changes_neither_loss_nor_gradient() -> None:
    torch.manual_seed(1)
    values = torch.randn(4, 6, 5)
    targets = torch.where(torch.rand(4, 6) > 0.2, 1, -100)
    total = float((targets != -100).sum())
    results = []
    for parts in (1, 2, 4):
        logits = values.clone().requires_grad_()
        outputs, batches = [], []
        for cut, target in zip(logits.chunk(parts), targets.chunk(parts), strict=True):
            outputs.append(ModelOutput(torch.zeros(1), {0: routing(cut.flatten(0, 1), 2)}))
            batches.append(Batch(target, target, target))
        counts = add_counts(count_assignments(o.routings, b) for o, b in zip(outputs, batches, strict=True))
        losses = [
            balance_loss(o, b, counts, total, BalanceConfig(aux=0.5, z=0.1))[0]
            for o, b in zip(outputs, batches, strict=True)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])
