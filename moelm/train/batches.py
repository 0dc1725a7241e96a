"""The batches of a run's steps on this process.

On a GPU, a thread reads the next step's batch while the GPU computes, into pinned memory, from which copies do not block.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelm.config import RunConfig
from moelm.data.loader import Batch, Rows, TrainOrder
from moelm.distributed.ranks import Ranks
from moelm.model import rng


class MicroBatch(NamedTuple):
    """The rows of one forward pass."""

    batch: Batch
    rng_keys_B: Tensor
    """Keys of the rows' random numbers, for routers that need them."""


class StepBatch(NamedTuple):
    """What a process needs of one step's data."""

    micro_batches: list[MicroBatch]
    num_valid_tokens: int
    """Of the global batch."""


class StepBatches:
    """This process's part of each step's batch, a function of the seed and the step.

    Args:
        rows: of the training split.
    """

    def __init__(self, rows: Rows, config: RunConfig, ranks: Ranks, device: torch.device) -> None:
        self.rows, self.config, self.ranks, self.device = rows, config, ranks, device
        self.order = TrainOrder(len(rows), config.batch_rows, config.seed)
        self.micro_rows = config.micro_batch_rows(ranks.size)
        self._thread: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            # A new thread would have the machine's first GPU as its device.
            self._thread = ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (torch.cuda.current_device(),))
        self._next: tuple[int, Future[StepBatch]] | None = None

    def __getitem__(self, step: int) -> StepBatch:
        """The batch of a step, on the device."""
        if self._thread is None:
            return self._to_device(self._read(step))
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._read, step)
        batch = self._to_device(self._next[1].result())
        # One thread reads all steps, so that an epoch's order is computed once.
        self._next = step + 1, self._thread.submit(self._read, step + 1)
        return batch

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int) -> StepBatch:
        """The batch of a step in host memory, pinned if there is a GPU."""
        rows = self.order.rows(step)
        own = np.split(rows, self.ranks.size)[self.ranks.rank]
        micro_batches = []
        for part in np.split(own, len(own) // self.micro_rows):
            tensors = *self.rows.batch(part), rng.row_keys(self.config.seed, step, torch.from_numpy(part))
            tokens, targets, fragments, keys = (x if self._thread is None else x.pin_memory() for x in tensors)
            micro_batches.append(MicroBatch(Batch(tokens, targets, fragments), keys))
        return StepBatch(micro_batches, self.rows.count_tokens(rows))

    def _to_device(self, step: StepBatch) -> StepBatch:
        return step._replace(
            micro_batches=[
                MicroBatch(batch.to(self.device), keys_B.to(self.device, non_blocking=True))
                for batch, keys_B in step.micro_batches
            ]
        )
