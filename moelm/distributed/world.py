"""The processes of one run and the little they say to each other; of one process, everything is said already.

Vectors of host values go through one float64 sum; everything larger is torch's matter.
"""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moelm.errors import MoelmError

T = TypeVar("T")


class LostProcess(MoelmError):
    """Another process of the run is gone or hangs."""

    exit_code = 134
    """That of an abort, after which schedulers try again."""


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
        try:
            return self.store is None or self.store.add(f"said/{sentence}", 1) == 1
        except dist.DistError:
            return True  # nobody is left to ask


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
    world = _meet(timedelta(seconds=timeout_s))
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _meet(timeout: timedelta) -> World:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        shared, rank, size = next(rendezvous("env://", timeout=timeout))
        store = _unwritten(shared, rank, size, timeout)
        own = PrefixStore("collectives", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
        return World(rank, size, store, dist.new_group(backend="gloo", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise LostProcess(f"The processes of this launch do not reach each other ({why}).") from error


def _unwritten(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of the store that no earlier attempt of this launch has written to.

    A launcher can keep its store over restarts, and who found an address there of before the last one would wait for a
    process that is gone. So the first process numbers the attempts and tells the number to all who ask, each of them under
    a name of its own.
    """
    if rank == 0:
        number = store.add("attempts", 1)
        waited = set(range(1, size))
        until = time.monotonic() + timeout.total_seconds()
        while waited:
            if time.monotonic() > until:
                raise RuntimeError(f"rank {min(waited)} has not come")
            for other in waited:
                if store.check([f"asks/{other}"]):
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", str(number))
            waited = {other for other in waited if not store.check([f"heard/{number}/{other}"])}
            time.sleep(0.01)
    else:
        name = uuid.uuid4().hex
        store.set(f"asks/{rank}", name)
        number = int(store.get(f"answer/{name}"))
        store.set(f"heard/{number}/{rank}", "")
    return PrefixStore(f"attempt-{number}", store)
