"""The fused loss against torch's cross-entropy of all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.loss import next_token_losses
from tests.tolerance import assert_close, relative_error


@pytest.mark.parametrize("block", [1, 3 * 40, 10**9])
def test_values_and_gradients_equal_cross_entropy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelm.model.loss.BLOCK", {"cpu": block})
    torch.manual_seed(0)
    x = torch.randn(7, 12, requires_grad=True)
    head = torch.randn(40, 12, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 39, -100, 5, 5])
    expected_N = F.cross_entropy(F.linear(x, head), targets, ignore_index=-100, reduction="none")
    losses = next_token_losses(x, head, targets)
    assert_close(losses.each_N, expected_N)
    found = torch.autograd.grad(losses.total * 0.3, (x, head))
    for grad, expected in zip(found, torch.autograd.grad(expected_N.sum() * 0.3, (x, head)), strict=True):
        assert_close(grad, expected)
    assert not losses.each_N.requires_grad


def test_with_bfloat16_logits_the_softmax_is_in_float32() -> None:
    torch.manual_seed(0)
    x, head, targets = torch.randn(64, 32, requires_grad=True), torch.randn(300, 32), torch.randint(0, 300, (64,))
    expected = F.cross_entropy(F.linear(x, head), targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = next_token_losses(x, head.requires_grad_(), targets)
    assert losses.each_N.dtype == torch.float32
    epsilon = torch.finfo(torch.bfloat16).eps
    assert relative_error(losses.total, expected) < epsilon / 4  # rounding errors of 64 tokens, which cancel
    found_grad, expected_grad = (torch.autograd.grad(loss, x)[0] for loss in (losses.total, expected))
    assert relative_error(found_grad, expected_grad) < 2 * epsilon


def test_logits_too_large_for_an_exponential_stay_finite() -> None:
    losses = next_token_losses(torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert losses.each_N.tolist() == [2000.0]
