"""Norm and rotary positions in few passes: their values and gradients against the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.model.norm import RMSNorm
from moelm.model.rope import rope_tables, rotate


def test_the_norm_has_the_values_and_gradients_of_torch() -> None:
    norm = RMSNorm(12, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(3, 5, 12, requires_grad=True)
    pull = torch.randn(3, 5, 12)
    meant = F.rms_norm(x, [12], norm.weight, 1e-5)
    mine = norm(x)
    torch.testing.assert_close(mine, meant)
    with torch.no_grad():  # evaluation, and the routing that is looked at ahead, see the same digits
        assert torch.equal(norm(x), mine)
    for a, b in zip(*(torch.autograd.grad(y, (x, norm.weight), pull) for y in (mine, meant)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_norm_of_a_strided_view() -> None:
    norm = RMSNorm(4, eps=1e-5).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x.view(2, 3, 2, 4)[:, :, :1]).transpose(1, 2) * x.view(2, 2, 3, 4), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_is_the_plain_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cos, sin = rope_tables(torch.arange(7), 8, 10_000.0)
    x = torch.randn(2, 7, 3, 8).to(dtype).requires_grad_()
    pull = torch.randn(2, 7, 3, 8).to(dtype)

    def both() -> tuple[Tensor, Tensor]:
        y = rotate(x, cos, sin)
        return y.detach(), torch.autograd.grad(y, x, pull)[0]

    mine = both()
    monkeypatch.setattr("moelm.model.norm.eager_on_cpu", lambda x: False)
    for a, b in zip(mine, both(), strict=True):
        assert a.dtype == dtype
        # Autograd rounds to bfloat16 between its passes.
        torch.testing.assert_close(a, b, **({} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.02}))
