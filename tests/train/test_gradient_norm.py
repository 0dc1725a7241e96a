"""Squared norms of gradients by matrix, as CPUs and as GPUs compute them, against their definition in float64."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

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


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Eight processes, which do not exist: two replicas of four shards."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (2, 4))
    dist.destroy_process_group()


def test_squares_of_shards_add_up_to_those_of_the_whole(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stacks by expert and by hidden unit, vectors and matrices that four processes cannot divide equally."""
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(*shape, generator=generator) for shape in ((5, 6, 4), (5, 6, 4), (5,), (3, 7))]
    dims = (0, 1, 0, 0)
    total = torch.zeros(12, dtype=torch.float64)
    for replica, shard in product(range(2), range(4)):
        monkeypatch.setattr(DeviceMesh, "get_local_rank", lambda _, dim, place=(replica, shard): place[dim])
        parameters = []
        for whole, dim in zip(wholes, dims, strict=True):
            own = [*torch.chunk(whole, 4, dim), whole.narrow(dim, 0, 0)][shard].contiguous()
            placements = [Replicate(), Shard(dim)]
            gradient = DTensor.from_local(own, mesh, placements, shape=whole.shape, stride=whole.stride())
            parameters.append(nn.Parameter(torch.zeros_like(gradient)))
            parameters[-1].grad = gradient
        total += _squares_by_few_kernels(parameters)
    expected = [whole.double().square().sum((1, 2) if whole.dim() == 3 else None).view(-1) for whole in wholes]
    assert_close(total, torch.cat(expected), dtype=torch.float32)


def test_cpus_sum_rows() -> None:
    parameters = parameters_with_gradients()
    assert torch.equal(gradient_squares(parameters), _squares_by_rows(parameters))
