"""The part of a distributed parameter that this process holds."""

import math

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor | None) -> Tensor:
    """This process's shard, which shares its memory; of a plain tensor, the tensor itself."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """The index of this process's shard in the whole parameter, by dimension."""
    index = [slice(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for mesh_dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                size = parameter.shape[placement.dim]
                index[placement.dim] = chunk(size, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
    return tuple(index)


def chunk(size: int, parts: int, number: int) -> slice:
    """The n-th of so many parts of a dimension, as `torch.chunk` divides it; the last ones may be smaller or empty."""
    length = -(-size // parts)
    return slice(min(size, length * number), min(size, length * (number + 1)))


def num_replicas(parameter: Tensor) -> int:
    """Number of processes that hold the same shard."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if placement.is_replicate())
