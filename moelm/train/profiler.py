"""A profiler trace of a few training steps, a table of the slowest operations, and the optimizer's share of a step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moelm.console import log

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""Steps skipped, steps of profiler warmup, and steps traced."""

ROWS = 20
"""Operations in the table."""

OPTIMIZERS = ("adamw", "muon")
"""Names of the ranges that the optimizer records."""


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
        for kind, share in update_shares(profiler.events()).items():
            table += f"\nThe update by {kind} takes {share:.1%} of a step (median)."
        log(f"{table}\nTrace of {ACTIVE} steps: {path}")

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as profiler:
        yield profiler.step
    if not finished:
        log(f"Nothing was traced: --profile needs at least {WAIT + WARMUP + ACTIVE} remaining steps.")


def update_shares(events: Iterable[Any]) -> dict[str, float]:
    """The share of each kind of optimizer in a step's time, on the GPU if there is one; the median over steps.

    Args:
        events: of torch's profiler.
    """
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    events = [event for event in events if event.device_type.name == device]
    steps = [event.time_range for event in events if event.name.startswith("ProfilerStep")]
    shares = {}
    for kind in OPTIMIZERS:
        ranges = [event.time_range for event in events if event.name == kind]
        if steps and ranges:
            shares[kind] = median(
                sum(each.elapsed_us() for each in ranges if step.start <= each.start < step.end) / step.elapsed_us()
                for step in steps
            )
    return shares
