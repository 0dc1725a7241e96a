"""The processes of one run and their communication; on a single process every operation returns its input.

Small host values are packed into one float64 all-reduce. Gradients, weights and rows of experts are communicated by FSDP2
and `moelm.distributed.expert_parallel`.
"""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moelm.errors import MoelmError, first_line
from moelm.hardware import pick_device

T = TypeVar("T")
Number = TypeVar("Number", bound=np.generic)


class LostRank(MoelmError):
    """Another process of the run has died or hangs."""

    exit_code = 134
    """That of an abort, after which schedulers retry."""


class Ranks(NamedTuple):
    """This process and the other processes of its run."""

    rank: int = 0
    size: int = 1
    store: Store | None = None
    """The launcher's key-value store, which works even when collectives hang."""
    checkpoint_group: dist.ProcessGroup | None = None
    """A second group of all processes, for checkpoints written in another thread."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def all_reduce(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes, float64, of tensors with the same shapes on each; one collective."""
        if self.size == 1:
            return list(values)
        packed = _pack(values)
        dist.all_reduce(packed)
        return _unpack(packed, values)

    def all_reduce_array(self, values: NDArray[Number], device: torch.device) -> NDArray[Number]:
        """The sum over all processes of an array, in its own dtype."""
        if self.size == 1:
            return values
        shared = torch.from_numpy(values).to(device)
        dist.all_reduce(shared)
        return shared.cpu().numpy()

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every process's value, by rank; `group` may be `checkpoint_group`."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    @contextmanager
    def shared_outcome(self) -> Iterator[None]:
        """A block that every process enters; a MoelmError in it on any process is raised on all of them."""
        failure: str | None = None
        try:
            yield
        except MoelmError as error:
            if self.size == 1:
                raise
            failure = str(error)
        for found in self.gather(failure):
            if found is not None:
                raise MoelmError(found)

    def first_to_report(self, message: str) -> bool:
        """Whether no other process has reported this message, so that it is printed once."""
        try:
            return self.store is None or self.store.add(f"said/{message}", 1) == 1
        except dist.DistError:
            return True  # the store is gone, and with it the other processes


def copy_to_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors as float64 on the host, in one copy, for which the host waits."""
    return _unpack(_pack(values).cpu(), values)


def _pack(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in values])


def _unpack(packed: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a packed tensor with the shapes of the values."""
    parts = torch.split(packed, [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


SINGLE_PROCESS = Ranks()


def is_launched() -> bool:
    """Whether a launcher (torchrun, or `--nproc`) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def distributed_context(timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Initialize torch.distributed for the processes of this launch; `SINGLE_PROCESS` without a launcher.

    Args:
        timeout_s: seconds that processes wait for each other.
    """
    if not is_launched():
        yield SINGLE_PROCESS
        return
    ranks = _initialize(timedelta(seconds=timeout_s))
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _initialize(timeout: timedelta) -> Ranks:
    device = pick_device()
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        shared, rank, size = next(rendezvous("env://", timeout=timeout))
        store = _attempt_store(shared, rank, size, timeout)
        own = PrefixStore("collectives", store)
        # With a device, groups are made from the first one's connections, and at once.
        device_id = device if on_gpu else None
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
        return Ranks(rank, size, store, dist.new_group(backend="gloo", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise LostRank(f"The processes of this launch cannot reach each other ({first_line(error)}).") from error


def _attempt_store(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A prefix of the store that no earlier attempt of this launch has used.

    A launcher can keep its store across restarts, and a process that read an address of an earlier attempt would wait for a
    dead process. So rank 0 numbers the attempts and answers each request, which has a unique name, with the number.
    """
    if rank == 0:
        number = store.add("attempts", 1)
        waiting = set(range(1, size))
        deadline = time.monotonic() + timeout.total_seconds()
        while waiting:
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {min(waiting)} did not connect")
            for other in waiting:
                if store.check([f"asks/{other}"]):
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", str(number))
            waiting = {other for other in waiting if not store.check([f"heard/{number}/{other}"])}
            time.sleep(0.01)
    else:
        name = uuid.uuid4().hex
        store.set(f"asks/{rank}", name)
        number = int(store.get(f"answer/{name}"))
        store.set(f"heard/{number}/{rank}", "")
    return PrefixStore(f"attempt-{number}", store)
