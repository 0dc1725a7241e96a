"""Who of the processes is still there: nobody waits for ever for one that hangs, and whoever is missed is named.

Each process has a thread that answers roll calls through the launcher's store, whatever its main thread is stuck in.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from moelm.distributed.world import LostProcess, World

PERIOD_S = 0.5
"""Seconds between looks at the store."""

PATIENCE_S = 5.0
"""Seconds in which a process that lives answers a roll call."""

PACKAGE = str(Path(__file__).parents[1])


class Watch:
    """This process's part in the watch; alone it does nothing.

    Args:
        timeout_s: seconds without a `touch` after which this process ends itself, counted from the first one.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self.world, self.timeout_s = world, timeout_s
        # Another connection: one that waits would keep the other thread waiting.
        self._store = None if world.store is None else PrefixStore("watch", world.store.clone())  # type: ignore[attr-defined]
        self._main = threading.get_ident()
        self._touched: float | None = None
        self._step = self._answered = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def touch(self, step: int | None = None) -> None:
        """Say that work goes on, after a step or within one."""
        self._touched = time.monotonic()
        self._step = self._step if step is None else step

    def explain(self) -> LostProcess | None:
        """Why a collective failed, if another process is missing."""
        if self._store is None:
            return None
        try:
            if self._store.check(["verdict"]):
                return LostProcess(self._store.get("verdict").decode())
            missing = [rank for rank, answer in self._roll_call().items() if answer is None]
        except dist.DistError:
            return LostProcess(f"Lost contact with the launcher after step {self._step:,}.")
        return LostProcess(self._sentence(missing)) if missing else None

    def _look(self) -> None:
        try:
            while not self._over.wait(PERIOD_S):
                self._answer()
                if self._touched is not None and time.monotonic() - self._touched > self.timeout_s:
                    self._end()
        except dist.DistError:
            return  # the store is gone, and with it the launcher: the collectives of the main thread fail too

    def _answer(self) -> None:
        assert self._store is not None
        calls = self._store.add("calls", 0)
        for number in range(self._answered + 1, calls + 1):  # several may ask at once
            self._store.set(f"{number}/{self.world.rank}", f"is in {self._place()}")
        self._answered = calls

    def _roll_call(self) -> dict[int, str | None]:
        """Each process's answer by rank; None where there was none."""
        assert self._store is not None
        number = self._store.add("calls", 1)
        until = time.monotonic() + PATIENCE_S
        waited: set[int] = set(range(self.world.size))
        while waited and time.monotonic() < until:
            if threading.current_thread() is self._thread:
                self._answer()
            waited = {rank for rank in waited if not self._store.check([f"{number}/{rank}"])}
            time.sleep(0.05)
        return {
            rank: None if rank in waited else self._store.get(f"{number}/{rank}").decode()
            for rank in range(self.world.size)
        }

    def _end(self) -> None:
        """Say who is missing, or where each is, and end this process; its main thread can do neither."""
        assert self._store is not None
        if self._store.check(["verdict"]):
            os._exit(LostProcess.exit_code)  # the others are gone, and have said why
        answers = self._roll_call()
        missing = [rank for rank, answer in answers.items() if answer is None]
        places = "; ".join(f"rank {rank} {answer}" for rank, answer in answers.items())
        sentence = f"No step was finished for {self.timeout_s:g} s, but all processes answer: {places}."
        sentence = self._sentence(missing) if missing else sentence
        self._store.set("verdict", sentence)
        if self.world.first_to_say(sentence):
            print(f"moelm: {sentence}", file=sys.stderr, flush=True)
        os._exit(LostProcess.exit_code)

    def _sentence(self, missing: list[int]) -> str:
        ranks = ", ".join(map(str, missing))
        one = len(missing) == 1
        return (
            f"Rank{'' if one else 's'} {ranks} of {self.world.size} {'does' if one else 'do'} not answer after step "
            f"{self._step:,}; give the same command again to go on from the newest checkpoint."
        )

    def _place(self) -> str:
        """The function of this package that the main thread is in."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        return "Python itself" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
