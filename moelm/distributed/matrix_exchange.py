"""Which process computes on which whole matrix, and the messages that bring its shards together and results back.

For operations on whole matrices, such as Muon's orthogonalization, of parameters that are sharded or replicated. Each
matrix has one owner among the processes that hold a part of it, so that nothing is computed twice.

Shapes: K matrices of a stack, N rows, M columns.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moelm.model.dtensor import chunk


class _Item(NamedTuple):
    """Consecutive matrices of one parameter, which have the same owner."""

    parameter: int
    """Index of the parameter."""
    matrices: slice
    """Of its holders' local stacks."""
    replicas: tuple[tuple[int, ...], ...]
    """Ranks that hold these matrices, by replica and shard."""
    cut: int
    """Dimension, 1 or 2, along which a replica's matrices are sharded."""
    shape: tuple[int, int, int]
    """Of the whole matrices, `(K, N, M)`."""
    blocks: int
    """Blocks of rows that are computed on by themselves."""

    @property
    def holders(self) -> list[int]:
        """All ranks that hold a part."""
        return [rank for replica in self.replicas for rank in replica]

    @property
    def cost(self) -> int:
        """Relative cost of products of the blocks with themselves."""
        count, rows, columns = self.shape
        return count * rows * columns * min(rows // self.blocks, columns)

    def replica_of(self, rank: int) -> tuple[int, ...]:
        """The ranks of one replica."""
        return next(replica for replica in self.replicas if rank in replica)

    def shard_of(self, rank: int) -> slice:
        """What a rank holds, along `cut`."""
        replica = self.replica_of(rank)
        return chunk(self.shape[self.cut], len(replica), replica.index(rank))

    def shard_shape(self, rank: int) -> torch.Size:
        """The shape of what a rank holds."""
        shape, shard = list(self.shape), self.shard_of(rank)
        shape[self.cut] = shard.stop - shard.start
        return torch.Size(shape)


class MatrixExchange:
    """The exchange for a list of parameters: matrices `(N, M)`, of so many blocks of rows, and stacks `(K, N, M)`.

    All processes of a run construct it together. Matrices are assigned to the least loaded of their holders, largest first;
    of a stack, consecutive ones. Each direction is one all-to-all over all processes.
    """

    def __init__(self, parameters: Sequence[Tensor], blocks: Sequence[int]) -> None:
        distributed = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        items = [
            item
            for index, (parameter, count) in enumerate(zip(parameters, blocks, strict=True))
            for item in _items(index, parameter, count, self.rank)
        ]
        self._sharded = any(len(item.replicas[0]) > 1 for item in items)
        self._shared = any(len(item.holders) > 1 for item in items)
        loads = [0] * self.size
        self._own: list[_Item] = []
        self._by_owner: list[list[_Item]] = [[] for _ in range(self.size)]
        """What this process holds a part of, and others own."""
        for item in sorted(items, key=lambda item: -item.cost):
            owner = min(item.holders, key=lambda rank: (loads[rank], rank))
            loads[owner] += item.cost
            if owner == self.rank:
                self._own.append(item)
            elif self.rank in item.holders:
                self._by_owner[owner].append(item)

    @property
    def owned_blocks(self) -> list[int]:
        """The number of blocks of each stack that `gather` returns."""
        return [item.blocks for item in self._own]

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The whole matrices that this process owns, as stacks `(K, N, M)`.

        Args:
            shards: this process's shard of each parameter, as a stack.
        """
        received: list[Iterator[Tensor]] = []
        if self._sharded:
            sent = [
                [shards[item.parameter][item.matrices] for item in items if self.rank in item.replica_of(owner)]
                for owner, items in enumerate(self._by_owner)
            ]
            received = self._all_to_all(sent, [
                [item.shard_shape(rank) for item in self._own if rank != self.rank and rank in item.replica_of(self.rank)]
                for rank in range(self.size)
            ], shards[0])  # fmt: skip
        whole = []
        for item in self._own:
            own = shards[item.parameter][item.matrices]
            parts = [own if rank == self.rank else next(received[rank]) for rank in item.replica_of(self.rank)]
            whole.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=item.cut))
        return whole

    def scatter(self, whole: Sequence[Tensor], shards: Sequence[Tensor]) -> list[Tensor]:
        """This process's shard of the result for each parameter, as a stack.

        Args:
            whole: results for the matrices of `gather`.
            shards: the arguments of `gather`.
        """

        def part(item: _Item, result: Tensor, rank: int) -> Tensor:
            shard = item.shard_of(rank)
            return result.narrow(item.cut, shard.start, shard.stop - shard.start)

        received: list[Iterator[Tensor]] = []
        if self._shared:
            results = list(zip(self._own, whole, strict=True))
            sent = [
                [part(item, result, rank) for item, result in results if rank != self.rank and rank in item.holders]
                for rank in range(self.size)
            ]
            expected = [[item.shard_shape(self.rank) for item in items] for items in self._by_owner]
            received = self._all_to_all(sent, expected, shards[0])
        parts = [(item, part(item, result, self.rank)) for item, result in zip(self._own, whole, strict=True)]
        parts += [(item, next(received[owner])) for owner, items in enumerate(self._by_owner) for item in items]
        by_parameter: list[list[Tensor]] = [[] for _ in shards]
        for item, result in sorted(parts, key=lambda pair: pair[0].matrices.start):
            by_parameter[item.parameter].append(result)
        return [
            results[0] if len(results) == 1 else torch.cat(results) if results else shard
            for results, shard in zip(by_parameter, shards, strict=True)
        ]

    def _all_to_all(
        self, sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[torch.Size]], like: Tensor
    ) -> list[Iterator[Tensor]]:
        """Send tensors to every process; returns iterators over those that each has sent.

        Args:
            sent: by receiver.
            expected: their shapes by sender.
            like: a tensor of their dtype, on their device.
        """
        counts = [sum(part.numel() for part in parts) for parts in sent]
        sizes = [[shape.numel() for shape in shapes] for shapes in expected]
        outgoing = torch.cat([like.new_empty(0), *(part.flatten() for parts in sent for part in parts)])
        incoming = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(incoming, outgoing, [sum(each) for each in sizes], counts)
        by_sender = torch.split(incoming, [sum(each) for each in sizes])
        return [
            (part.view(shape) for part, shape in zip(torch.split(received, each), shapes, strict=True))
            for received, each, shapes in zip(by_sender, sizes, expected, strict=True)
        ]


def _items(index: int, parameter: Tensor, blocks: int, rank: int) -> Iterator[_Item]:
    """The items of one parameter, on all processes."""
    shape = (1, *parameter.shape)[-3:]
    ranks_SRC = [[[rank]]]
    cut = 1
    if isinstance(parameter, DTensor):
        stack, replicate, sharded = [], [], []
        for mesh_dim, placement in enumerate(parameter.placements):
            if not isinstance(placement, Shard):
                replicate.append(mesh_dim)
            elif placement.dim == 0 and parameter.dim() == 3:
                stack.append(mesh_dim)
            else:
                sharded.append(mesh_dim)
                cut = placement.dim + 3 - parameter.dim()
        mesh = parameter.device_mesh.mesh
        assert all(sum(mesh.shape[i] > 1 for i in dims) <= 1 for dims in (stack, sharded))
        # Dimensions: parts of the stack, replicas, shards of matrices.
        sizes = [math.prod(mesh.shape[i] for i in dims) for dims in (stack, replicate, sharded)]
        ranks_SRC = mesh.permute(*stack, *replicate, *sharded).reshape(sizes).tolist()
    for number, replicas in enumerate(ranks_SRC):
        held = chunk(shape[0], len(ranks_SRC), number)
        count = held.stop - held.start
        parts = min(count, len(replicas) * len(replicas[0]))
        for part in range(parts):
            matrices = slice(count * part // parts, count * (part + 1) // parts)
            whole = (matrices.stop - matrices.start, shape[1], shape[2])
            yield _Item(index, matrices, tuple(map(tuple, replicas)), cut, whole, blocks)
