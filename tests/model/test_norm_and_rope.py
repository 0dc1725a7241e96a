"""RMSNorm against torch, and rotary embeddings against complex multiplication."""

import pytest
import torch
import torch.nn.functional as F

from moelm.config import DenseFFNConfig, ModelConfig
from moelm.model.norm import RMSNorm
from moelm.model.rope import rope_tables, rotate
from tests.tolerance import assert_close


def test_norm_has_the_values_and_gradients_of_torch() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(12, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(3, 5, 12, requires_grad=True)
    upstream = torch.randn(3, 5, 12)
    expected = F.rms_norm(x, [12], norm.weight, 1e-5)
    found = norm(x)
    assert_close(found, expected)
    with torch.no_grad():  # evaluation is bitwise equal to training
        assert torch.equal(norm(x), found)
    found_grads, expected_grads = (torch.autograd.grad(y, (x, norm.weight), upstream) for y in (found, expected))
    for grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert_close(grad, expected_grad)


def test_gradient_of_the_norm_of_a_strided_view() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(4, eps=1e-5).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x.view(2, 3, 2, 4)[:, :, :1]).transpose(1, 2) * x.view(2, 2, 3, 4), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_equals_complex_multiplication(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 8).to(dtype)
    angles = torch.arange(7).double()[:, None] * 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    config = ModelConfig(dim=24, num_layers=1, num_heads=3, ffn=DenseFFNConfig(kind="dense", hidden_dim=8))
    found = rotate(x, *rope_tables(torch.arange(7), config))
    assert found.dtype == dtype
    assert_close(found, torch.cat((rotated.real, rotated.imag), dim=-1), epsilons=4)
