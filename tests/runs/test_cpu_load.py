"""The use of the machine by other processes, from a /proc/stat with known numbers."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moelm.runs import cpu_load
from moelm.runs.cpu_load import CpuLoad, CpuTimes, CpuUse, mean_use, read_machine_times
from tests.conftest import metrics_lines, train_here

TICKS = os.sysconf("SC_CLK_TCK")


def alone(value: tuple[str, float]) -> list[tuple[str, float]]:
    return [value]


def test_the_first_line_of_proc_stat_is_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """user, nice, system, (idle, iowait), irq, softirq are busy; guest time is in user already."""
    path = tmp_path / "stat"
    path.write_text("cpu  1000 200 30 9999 8888 4 5 60 70 80\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(cpu_load, "PROC_STAT", path)
    assert read_machine_times() == pytest.approx((1239 / TICKS, 60 / TICKS))
    for text in ("", "cpu", "cpu 1 2 3", "intr a b c d e f g h"):
        path.write_text(text)
        assert read_machine_times() is None
    path.unlink()
    assert read_machine_times() is None
    load = CpuLoad(alone, threads=1)
    assert load.as_metrics() == {}
    assert load.describe() is None


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what consecutive readings return: the clock, and the machine's busy and withheld seconds."""

    def set_moments(*readings: tuple[float, float, float]) -> None:
        clock, machine = itertools.tee(readings)
        monkeypatch.setattr(cpu_load.time, "monotonic", lambda: next(clock)[0])
        monkeypatch.setattr(cpu_load, "read_machine_times", lambda: next(machine)[1:])

    return set_moments


def test_the_runs_own_processes_are_subtracted(moments: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 20 s the machine was busy for 30 s, of which 14 s were those of two processes of the run."""
    moments((100.0, 500.0, 3.0), (120.0, 530.0, 4.0), (140.0, 530.5, 4.0))
    here = cpu_load.boot_id()
    own = iter([1.0, 5.0, 99.0, 8.0, 12.0, 500.0, 8.0, 12.0, 900.0])
    load = CpuLoad(lambda _: [(here, next(own)), (here, next(own)), ("elsewhere", next(own))], threads=1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert load.as_metrics() == pytest.approx({"perf/cpu_others": 16 / 20, "perf/cpu_steal": 1 / 20})
    assert load.describe() == "other processes used 0.8 of 2 CPUs"
    assert load.as_metrics() == pytest.approx({"perf/cpu_others": 0.025, "perf/cpu_steal": 0.0})


def test_a_machine_that_counts_nothing_is_not_recorded() -> None:
    assert CpuTimes(0, 0, 0, 0).until(CpuTimes(10, 0, 0, 9)) is None
    assert CpuTimes(0, 0, 0, 0).until(CpuTimes(10, 8.95, 0, 9)) == CpuUse(0, 0, 10)


@pytest.mark.parametrize(
    ("use", "threads", "clause"),
    [
        (CpuUse(0.19, 0.09, 60), 2, None),
        (CpuUse(0.9, 0.0, 9), 2, None),
        (CpuUse(0.9, 0.0, 60), 2, "other processes used 0.9 of 2 CPUs"),
        (CpuUse(1.1, 0.0, 60), 1, None),
        (CpuUse(1.3, 0.0, 60), 1, "other processes used 1.3 of 2 CPUs"),
        (CpuUse(0.3, 0.0, 60), 4, "other processes used 0.3 of 2 CPUs"),
        (CpuUse(0.0, 0.2, 60), 1, "the host of this virtual machine withheld 0.2 of 2"),
    ],
)
def test_a_load_above_the_limits_is_described(use: CpuUse, threads: int, clause: str | None) -> None:
    assert use.describe_load(2, threads) == clause


def test_means_are_weighted_by_training_time() -> None:
    lines = [
        {"time_s": 10.0, "perf/cpu_others": 1.0, "perf/cpu_steal": 0.0},
        {"time_s": 12.0},
        {"time_s": 40.0, "perf/cpu_others": 0.2, "perf/cpu_steal": 0.1},
    ]
    assert mean_use(lines) == pytest.approx((0.4, 0.075, 40))
    assert mean_use([{"time_s": 12.0}]) is None
    assert mean_use([]) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_the_time_of_a_child_is_the_runs_own() -> None:
    load = CpuLoad(alone, threads=1)
    before = load._first
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert before is not None
    after = load._read()
    assert after is not None
    assert after.own > before.own
    assert after.busy > before.busy


def test_a_run_records_it_at_evaluations(workplace: Path) -> None:
    lines = metrics_lines(train_here(workplace, "dense"))
    recorded = [line["step"] for line in lines if "perf/cpu_others" in line]
    assert recorded == [line["step"] for line in lines if "val/loss" in line]
    assert all(line["perf/cpu_others"] >= 0 for line in lines if "perf/cpu_others" in line)
