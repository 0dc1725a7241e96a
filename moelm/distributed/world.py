"""The processes of one run and the little they say to each other; of one process, everything is said already.

Vectors of host values go through one float64 sum; everything larger is torch's matter.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


class World(NamedTuple):
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    store: Store | None = None
    """Where any of them can leave a word for the others, even when collectives hang."""
    savers: dist.ProcessGroup | None = None
    """The same processes once more, for what is saved meanwhile in another thread."""

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes, float64, of tensors that have the same shapes on each; one collective."""
        if self.size == 1:
            return list(values)
        packed = torch.cat([value.detach().flatten().double() for value in values])
        dist.all_reduce(packed)
        parts = torch.split(packed, [value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def from_first(self, value: T) -> T:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every process's value, by rank; `group` may be `savers`."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier()

    def first_to_say(self, sentence: str) -> bool:
        """Whether no other process has said this before, so that what all find out is told once."""
        return self.store is None or self.store.add(f"said/{sentence}", 1) == 1


ALONE = World()
"""One process."""


def launched() -> bool:
    """Whether a launcher (torchrun, or `--nproc`) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(timeout_s: float = 600.0) -> Iterator[World]:
    """Find the other processes of this launch; alone where there was none.

    Args:
        timeout_s: seconds that they wait for each other.
    """
    if not launched():
        yield ALONE
        return
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("collectives", store), rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, store, dist.new_group(backend="gloo", timeout=timeout))
    finally:
        dist.destroy_process_group()
