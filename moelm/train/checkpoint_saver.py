"""Asynchronous checkpoint saving: the state is copied at once and written by another thread."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import cast

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from moelm.console import warn
from moelm.distributed.ranks import Ranks
from moelm.hardware import pick_device
from moelm.model import Transformer
from moelm.runs.checkpoint import Progress, State, prune, save_checkpoint, training_state

# Copies are synchronous, into buffers that are reused for the next checkpoint.
_STAGING = StagingOptions(
    use_pinned_memory=torch.cuda.is_available(),
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


class CheckpointSaver:
    """Writes one checkpoint at a time; each process writes its shard.

    Args:
        folder: of the run's checkpoints.
        keep: number of newest checkpoints to retain.
        while_waiting: called about once a second while waiting for a checkpoint.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, while_waiting: Callable[[], None]) -> None:
        self.folder, self.keep, self.ranks, self.while_waiting = folder, keep, ranks, while_waiting
        self._stager = DefaultStager(_STAGING)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver", initializer=_initialize_thread)
        self._future: Future[None] | None = None
        self._step = 0

    def save(self, model: Transformer, optimizer: Optimizer, progress: Progress) -> None:
        """Copy the state and start writing it; an earlier checkpoint must be finished."""
        assert self._future is None
        state = cast(State, self._stager.stage(training_state(model, optimizer)))
        self._step = progress["step"]
        self._future = self._thread.submit(self._write, state, dict(progress))

    def _write(self, state: State, progress: Progress) -> None:
        saved = save_checkpoint(self.folder, state, progress, self.ranks)
        if self.ranks.is_main:
            try:
                prune(self.folder, self.keep, saved)
            except OSError as error:
                warn(f"an old checkpoint could not be deleted ({error}).")

    def finish(self, block: bool = True) -> str | None:
        """Finish the checkpoint that is being written.

        Args:
            block: whether to wait for it; otherwise an unfinished one is left alone.

        Returns:
            A sentence if it failed, the same on every process.
        """
        future = self._future
        if future is None or not (block or future.done()):
            return None
        self._future = None
        while not future.done():
            self.while_waiting()
            wait([future], timeout=1.0)
        try:
            future.result()
        except OSError as error:
            return f"The checkpoint of step {self._step:,} could not be saved ({error}); earlier ones are untouched."
        return None

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


def _initialize_thread() -> None:
    """Select this process's GPU, and give training steps priority on shared cores."""
    pick_device()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
