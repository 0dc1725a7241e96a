"""The gradient norm and clipping, against torch's own."""

import pytest
import torch

from moelm.train.optimizer import clip_gradients, gradient_squares
from tests.tolerance import assert_close


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_equals_torch(limit: float) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(shape) for shape in ((7,), (3, 4), (2, 3, 5))]
    found, expected = ([torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads] for _ in range(2))
    for parameters in (found, expected):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
    norm = clip_gradients(found, gradient_squares(found), limit)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(expected, limit))
    for parameter, other in zip(found, expected, strict=True):
        assert_close(parameter.grad, other.grad)
