"""Saving while training goes on: the state is copied at once and written by another thread."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import cast

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from moelm.checkpoint import Progress, State, prune, save_checkpoint, training_state
from moelm.console import console
from moelm.distributed.world import World
from moelm.hardware import pick_device
from moelm.model import Transformer

_IN_PLACE = StagingOptions(
    use_pinned_memory=torch.cuda.is_available(),
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)
"""Copies are made at once, into memory that is kept for the next time."""


class Saver:
    """Writes one checkpoint at a time, each process its part.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the newest are kept.
        waiting: called now and then while a checkpoint is waited for.
    """

    def __init__(self, folder: Path, keep: int, world: World, waiting: Callable[[], None]) -> None:
        self.folder, self.keep, self.world, self.waiting = folder, keep, world, waiting
        self._stager = DefaultStager(_IN_PLACE)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver", initializer=_settle)
        self._writing: Future[None] | None = None
        self._step = 0

    def save(self, model: Transformer, optimizer: Optimizer, progress: Progress) -> None:
        """Copy the state and begin to write it; an earlier checkpoint must be finished."""
        assert self._writing is None
        state = cast(State, self._stager.stage(training_state(model, optimizer)))
        self._step = progress["step"]
        self._writing = self._thread.submit(self._write, state, dict(progress))

    def _write(self, state: State, progress: Progress) -> None:
        saved = save_checkpoint(self.folder, state, progress, self.world)
        if self.world.first:
            try:
                prune(self.folder, self.keep, saved)
            except OSError as error:
                console.print(f"Warning: an old checkpoint could not be deleted ({error}).", soft_wrap=True, markup=False)

    def finish(self, wait: bool = True) -> str | None:
        """End what is being written.

        Args:
            wait: for it to be ready; else one that is not is left alone.

        Returns:
            A sentence if it failed; the same on every process.
        """
        writing = self._writing
        if writing is None or not (wait or writing.done()):
            return None
        self._writing = None
        while not writing.done():
            self.waiting()
            wait_for([writing], timeout=1.0)
        try:
            writing.result()
        except OSError as error:
            return f"The checkpoint of step {self._step:,} could not be saved ({error}); earlier ones are untouched."
        return None

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


def _settle() -> None:
    """Use this process's GPU, and let the steps of training go first where a core is wanted by both."""
    pick_device()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
