"""Squared norms of gradients by matrix, as CPUs and as GPUs compute them, against their definition in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from moelm.train.gradient_norm import _squares_by_few_kernels, _squares_by_rows, gradient_squares
from tests.tolerance import assert_close

Squares = Callable[[Sequence[nn.Parameter]], Tensor]
both = pytest.mark.parametrize("squares_of", [_squares_by_rows, _squares_by_few_kernels], ids=["CPU", "GPU"])


def parameters_with_gradients() -> list[nn.Parameter]:
    """A vector, a stack of experts of which one has no gradient, and a matrix."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(*shape)) for shape in ((16,), (4, 12, 16), (16, 8))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parameters[1].grad[2] = 0
    return parameters


@both
def test_the_squares_have_an_entry_for_each_expert(squares_of: Squares) -> None:
    vector, stack, matrix = parameters_with_gradients()
    squares = squares_of([vector, stack, matrix])
    gradients = [vector.grad[None], *stack.grad.unbind(), matrix.grad]
    assert_close(squares, torch.stack([gradient.double().square().sum() for gradient in gradients]), dtype=torch.float32)
    assert squares[3] == 0


@both
def test_parameters_without_a_gradient_have_zeros(squares_of: Squares) -> None:
    vector, stack, matrix = parameters_with_gradients()
    expected = squares_of([vector, stack, matrix])
    for parameter, entries in ((vector, slice(0, 1)), (stack, slice(1, 5)), (matrix, slice(5, 6))):
        parameter.grad, expected[entries] = None, 0
        assert torch.equal(squares_of([vector, stack, matrix]), expected)


def test_cpus_sum_rows() -> None:
    parameters = parameters_with_gradients()
    assert torch.equal(gradient_squares(parameters), _squares_by_rows(parameters))
