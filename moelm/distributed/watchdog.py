"""Detection of dead and hanging processes, and of which one it is.

Each process has a thread that answers roll calls through the launcher's store, whatever its main thread is doing. Processes
that need a roll call at the same time share one, and count the answers, so that a process makes a few requests however many
processes there are.
"""

import math
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

WAIT_INTERVAL_S = 0.2
"""Seconds between reads of the number of answers."""

ANSWER_TIMEOUT_S = 5.0
"""Seconds without another answer after which a roll call ends; a living process answers within them."""

MAX_NAMED = 8
"""Maximum number of ranks that a message lists."""

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
        self._step = 0
        self._answered = 0, -math.inf  # the last roll call, and when
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
            answers = self._roll_call()
        except dist.DistError:
            return LostRank(f"Lost contact with the launcher after step {self._step:,}.")
        return LostRank(self._describe_missing(answers)) if len(answers) < self.ranks.size else None

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_INTERVAL_S):
                self._answer()
                if self._last_heartbeat is not None and time.monotonic() - self._last_heartbeat > self.timeout_s:
                    self._exit()
        except dist.DistError:
            return  # the store is gone with the launcher, and the main thread's collectives fail too

    def _answer(self) -> None:
        """Answer the roll calls that this process has not answered."""
        assert self._store is not None
        if not self._store.check(["call"]):
            return
        last = int(self._store.get("call"))
        for call in range(self._answered[0] + 1, last + 1):
            answer = f"{self.ranks.rank} {self._current_function()}\n"
            self._store.append(f"{call}/answers", answer)  # type: ignore[attr-defined]
            self._store.add(f"{call}/count", 1)
            self._answered = call, time.monotonic()

    def _roll_call(self) -> dict[int, str]:
        """The function that each process is in, by rank, of those that answer in time."""
        assert self._store is not None
        call, answered_at = self._answered
        if time.monotonic() - answered_at > ANSWER_TIMEOUT_S:
            # Of several processes that know the same last call, the first opens the next, and the others join it.
            call = int(self._store.compare_set("call", str(call or ""), str(call + 1)))
        count, changed_at = 0, time.monotonic()
        while count < self.ranks.size and time.monotonic() - changed_at < ANSWER_TIMEOUT_S:
            if threading.current_thread() is self._thread:
                self._answer()
            time.sleep(WAIT_INTERVAL_S)
            if (now := self._store.add(f"{call}/count", 0)) > count:
                count, changed_at = now, time.monotonic()
        if not self._store.check([f"{call}/answers"]):
            return {}
        lines = self._store.get(f"{call}/answers").decode().splitlines()
        return {int(rank): function for rank, _, function in (line.partition(" ") for line in lines)}

    def _exit(self) -> None:
        """Report which processes are missing, or where each one is, and exit; the blocked main thread can do neither."""
        assert self._store is not None
        if self._store.check(["verdict"]):
            os._exit(LostRank.exit_code)  # another process has reported it
        answers = self._roll_call()
        if len(answers) < self.ranks.size:
            message = self._describe_missing(answers)
        else:
            functions = {function: [rank for rank in answers if answers[rank] == function] for function in answers.values()}
            where = "; ".join(
                f"{_name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} in {function}"
                for function, ranks in sorted(functions.items(), key=lambda item: len(item[1]))
            )
            message = f"No step finished within {self.timeout_s:g} s, but all processes respond: {where}."
        self._store.set("verdict", message)
        if self.ranks.first_to_report(message):
            print(f"moelm: {message}", file=sys.stderr, flush=True)
        os._exit(LostRank.exit_code)

    def _describe_missing(self, answers: dict[int, str]) -> str:
        missing = [rank for rank in range(self.ranks.size) if rank not in answers]
        names = _name_ranks(missing)
        return (
            f"{names[0].upper()}{names[1:]} of {self.ranks.size} {'does' if len(missing) == 1 else 'do'} not respond after "
            f"step {self._step:,}; run the same command again to continue from the newest checkpoint."
        )

    def _current_function(self) -> str:
        """The function of this package that the main thread is in."""
        frame: FrameType | None = sys._current_frames().get(self._main_thread)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        return "Python itself" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


def _name_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 1, 2, 3 and 9 more`."""
    ranks = sorted(ranks)
    names = ", ".join(map(str, ranks[:MAX_NAMED]))
    more = f" and {len(ranks) - MAX_NAMED:,} more" if len(ranks) > MAX_NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {names}{more}"
