"""Where the time of a few training steps went: a trace for a viewer, and the top of its table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moelm.console import console

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""Steps passed over, steps in which the profiler settles, steps that are traced."""

ROWS = 20
"""Operations shown."""


@contextmanager
def profiling(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Trace a few of the steps inside and write `trace.json`; gives a function to call after every step.

    Args:
        folder: where the trace goes; None traces nothing.
    """
    if folder is None:
        yield lambda: None
        return
    path = folder / "trace.json"
    told = False

    def finish(profiler: Any) -> None:
        nonlocal told
        told = True
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=48)
        profiler.export_chrome_trace(str(path))
        console.print(f"{table}\nTrace of {ACTIVE} steps: {path}", soft_wrap=True, markup=False)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as profiler:
        yield profiler.step
    if not told:
        console.print(f"Nothing was traced: --profile needs {WAIT + WARMUP + ACTIVE} steps to go.", soft_wrap=True)
