"""Detection of dead and hanging processes, and of which one it is.

Each process has a thread that answers roll calls through the launcher's store, whatever its main thread is doing.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from moelm.distributed.ranks import LostRank, Ranks

POLL_INTERVAL_S = 0.5
"""Seconds between reads of the store."""

ANSWER_TIMEOUT_S = 5.0
"""Seconds within which a living process answers a roll call."""

PACKAGE = str(Path(__file__).parents[1])


class Watchdog:
    """This process's watchdog; on a single process it does nothing.

    Args:
        timeout_s: seconds without a heartbeat, after the first one, until this process exits.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        # A connection of its own: a blocking call on a shared one would block the other thread.
        self._store = None if ranks.store is None else PrefixStore("watch", ranks.store.clone())  # type: ignore[attr-defined]
        self._main_thread = threading.get_ident()
        self._last_heartbeat: float | None = None
        self._step = self._answered = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def heartbeat(self, step: int | None = None) -> None:
        """Report progress, after a step or within one."""
        self._last_heartbeat = time.monotonic()
        self._step = self._step if step is None else step

    def explain(self) -> LostRank | None:
        """Why a collective failed, if another process is missing."""
        if self._store is None:
            return None
        try:
            if self._store.check(["verdict"]):
                return LostRank(self._store.get("verdict").decode())
            missing = [rank for rank, answer in self._roll_call().items() if answer is None]
        except dist.DistError:
            return LostRank(f"Lost contact with the launcher after step {self._step:,}.")
        return LostRank(self._describe_missing(missing)) if missing else None

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_INTERVAL_S):
                self._answer()
                if self._last_heartbeat is not None and time.monotonic() - self._last_heartbeat > self.timeout_s:
                    self._exit()
        except dist.DistError:
            return  # the store is gone with the launcher, and the main thread's collectives fail too

    def _answer(self) -> None:
        assert self._store is not None
        calls = self._store.add("calls", 0)
        for number in range(self._answered + 1, calls + 1):  # several processes may call at once
            self._store.set(f"{number}/{self.ranks.rank}", f"is in {self._current_function()}")
        self._answered = calls

    def _roll_call(self) -> dict[int, str | None]:
        """Each process's answer by rank; None if there was none in time."""
        assert self._store is not None
        number = self._store.add("calls", 1)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        silent: set[int] = set(range(self.ranks.size))
        while silent and time.monotonic() < deadline:
            if threading.current_thread() is self._thread:
                self._answer()
            silent = {rank for rank in silent if not self._store.check([f"{number}/{rank}"])}
            time.sleep(0.05)
        return {
            rank: None if rank in silent else self._store.get(f"{number}/{rank}").decode()
            for rank in range(self.ranks.size)
        }

    def _exit(self) -> None:
        """Report which processes are missing, or where each one is, and exit; the blocked main thread can do neither."""
        assert self._store is not None
        if self._store.check(["verdict"]):
            os._exit(LostRank.exit_code)  # another process has reported it
        answers = self._roll_call()
        missing = [rank for rank, answer in answers.items() if answer is None]
        where = "; ".join(f"rank {rank} {answer}" for rank, answer in answers.items())
        message = f"No step finished within {self.timeout_s:g} s, but all processes respond: {where}."
        message = self._describe_missing(missing) if missing else message
        self._store.set("verdict", message)
        if self.ranks.first_to_report(message):
            print(f"moelm: {message}", file=sys.stderr, flush=True)
        os._exit(LostRank.exit_code)

    def _describe_missing(self, missing: list[int]) -> str:
        names = ", ".join(map(str, missing))
        one = len(missing) == 1
        return (
            f"Rank{'' if one else 's'} {names} of {self.ranks.size} {'does' if one else 'do'} not respond after step "
            f"{self._step:,}; run the same command again to continue from the newest checkpoint."
        )

    def _current_function(self) -> str:
        """The function of this package that the main thread is in."""
        frame: FrameType | None = sys._current_frames().get(self._main_thread)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        return "Python itself" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
