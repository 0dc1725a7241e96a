"""How many CPUs other processes used while a run trained, from /proc/stat. Nothing here imports torch.

Training times are comparable only if no other process used the CPUs that a run's threads need. Where there is no
/proc/stat, nothing is recorded.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from moelm.runs.lock import boot_id
from moelm.runs.metrics import Line, is_finite

OTHERS_LIMIT = 0.1
"""Mean share of the machine's CPUs that other processes may use, beyond those that a run leaves to them."""
STEAL_LIMIT = 0.05
"""Mean share that a virtual machine's host may withhold."""
MIN_SECONDS = 10.0
"""Duration from which means are precise enough to warn of: the kernel counts in hundredths of a second."""
OTHERS, STEAL = "perf/cpu_others", "perf/cpu_steal"
PROC_STAT = Path("/proc/stat")


class CpuUse(NamedTuple):
    """Mean numbers of CPUs over some time, and that time in seconds."""

    others: float
    """Used by other processes."""
    steal: float
    """Withheld by the host of a virtual machine."""
    seconds: float

    def describe_load(self, cpus: int, threads: int) -> str | None:
        """What disturbed a run, as a clause; None if little did, or the time was too short.

        Args:
            cpus: of the machine.
            threads: of the run, on this machine; other processes may use the rest of the CPUs.
        """
        if self.seconds < MIN_SECONDS:
            return None
        causes = []
        if self.others > max(cpus - threads, 0) + OTHERS_LIMIT * cpus:
            causes.append(f"other processes used {self.others:.1f} of {cpus} CPUs")
        if self.steal > STEAL_LIMIT * cpus:
            causes.append(f"the host of this virtual machine withheld {self.steal:.1f} of {cpus}")
        return " and ".join(causes) or None


class CpuTimes(NamedTuple):
    """Seconds of CPU time up to a moment, over all CPUs of the machine."""

    at: float
    busy: float
    steal: float
    own: float
    """Of the processes of this run on this machine."""

    def until(self, later: "CpuTimes") -> CpuUse | None:
        """The use between two moments; None if the machine counts less than the run itself, as in some sandboxes."""
        at, busy, steal, own = (after - before for before, after in zip(self, later, strict=True))
        # The two clocks have different ticks.
        if at <= 0 or busy < 0.5 * own - 0.1:
            return None
        return CpuUse(max(0.0, busy - own) / at, steal / at, at)


class CpuLoad:
    """The use of the machine since this object was made, and since the last line of metrics.

    Args:
        gather: collects a value from every process of the run.
        threads: of each process.
    """

    def __init__(self, gather: Callable[[tuple[str, float]], list[tuple[str, float]]], threads: int) -> None:
        self._gather, self._threads = gather, threads
        self._first = self._last = self._read()

    def as_metrics(self) -> Line:
        """Means since the last call; every process of the run makes it."""
        before, self._last = self._last, self._read()
        use = before.until(self._last) if before and self._last else None
        return {} if use is None else {OTHERS: use.others, STEAL: use.steal}

    def describe(self) -> str | None:
        """What disturbed the run up to the last call of `as_metrics`, as a clause; None if little did."""
        use = self._first.until(self._last) if self._first and self._last else None
        return None if use is None else use.describe_load(os.cpu_count() or 1, self._threads * self._processes)

    def _read(self) -> CpuTimes | None:
        machine = boot_id()
        own = self._gather((machine, sum(os.times()[:4])))
        counted = read_machine_times()
        here = [seconds for where, seconds in own if where == machine]
        self._processes = len(here)
        return None if counted is None else CpuTimes(time.monotonic(), *counted, sum(here))


def read_machine_times() -> tuple[float, float] | None:
    """Seconds in which CPUs were busy, and that were withheld, since the machine's start; None if they are not counted."""
    try:
        fields = PROC_STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def mean_use(lines: Sequence[Line]) -> CpuUse | None:
    """The mean use over the training time of a run; None if it was not recorded.

    Args:
        lines: of metrics.jsonl.
    """
    recorded = [line for line in lines if is_finite(line.get(OTHERS)) and is_finite(line.get(STEAL))]
    before = [0.0, *(line["time_s"] for line in recorded[:-1])]
    weights = [line["time_s"] - earlier for line, earlier in zip(recorded, before, strict=True)] if recorded else []
    if (total := sum(weights)) <= 0:
        return None
    others, steal = (
        sum(line[key] * weight for line, weight in zip(recorded, weights, strict=True)) / total for key in (OTHERS, STEAL)
    )
    return CpuUse(others, steal, total)
