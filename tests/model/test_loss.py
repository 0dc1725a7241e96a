"""Losses from hidden states against torch's own cross-entropy over all scores at once."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.loss import next_token_losses


@pytest.mark.parametrize("block", [1, 3 * 40, 10**9])
def test_values_and_gradients_are_those_of_cross_entropy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelm.model.loss.BLOCK", {"cpu": block})
    torch.manual_seed(0)
    x = torch.randn(7, 12, requires_grad=True)
    head = torch.randn(40, 12, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 39, -100, 5, 5])
    meant_each = F.cross_entropy(F.linear(x, head), targets, ignore_index=-100, reduction="none")
    losses = next_token_losses(x, head, targets)
    torch.testing.assert_close(losses.each_N, meant_each)
    mine = torch.autograd.grad(losses.total * 0.3, (x, head))
    for a, b in zip(mine, torch.autograd.grad(meant_each.sum() * 0.3, (x, head)), strict=True):
        torch.testing.assert_close(a, b)
    assert not losses.each_N.requires_grad


def test_bfloat16_scores_keep_the_softmax_in_float32() -> None:
    torch.manual_seed(0)
    x, head, targets = torch.randn(64, 32, requires_grad=True), torch.randn(300, 32), torch.randint(0, 300, (64,))
    meant = F.cross_entropy(F.linear(x, head), targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = next_token_losses(x, head.requires_grad_(), targets)
    assert losses.each_N.dtype == torch.float32
    torch.testing.assert_close(losses.total, meant, rtol=5e-3, atol=0)
    mine, its = (torch.autograd.grad(loss, x)[0] for loss in (losses.total, meant))
    assert (mine - its).norm() < 0.02 * its.norm()


def test_scores_too_large_for_an_exponential_stay_finite() -> None:
    losses = next_token_losses(torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    torch.testing.assert_close(losses.each_N, torch.tensor([2000.0]))
