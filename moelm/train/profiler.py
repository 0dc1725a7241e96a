"""A profiler trace of a few training steps, and a table of the slowest operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moelm.console import log

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""Steps skipped, steps of profiler warmup, and steps traced."""

ROWS = 20
"""Operations in the table."""


@contextmanager
def profile_steps(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Trace a few steps and write `trace.json`; yields a function to call after every step.

    Args:
        folder: of the trace; None disables profiling.
    """
    if folder is None:
        yield lambda: None
        return
    path = folder / "trace.json"
    finished = False

    def finish(profiler: Any) -> None:
        nonlocal finished
        finished = True
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=48)
        profiler.export_chrome_trace(str(path))
        log(f"{table}\nTrace of {ACTIVE} steps: {path}")

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as profiler:
        yield profiler.step
    if not finished:
        log(f"Nothing was traced: --profile needs at least {WAIT + WARMUP + ACTIVE} remaining steps.")
