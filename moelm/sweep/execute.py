"""Training of a sweep's runs one after another, each in its own process with its own memory and allocator."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from moelm.config import RunConfig, differing, load_config, trajectory_settings
from moelm.console import log, warn
from moelm.data.identity import check_record, folder_to_train_on
from moelm.distributed.launcher import stop_signals
from moelm.errors import MoelmError
from moelm.runs.checkpoint import list_checkpoints, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import read_data_record
from moelm.runs.metrics import last_evaluation
from moelm.sweep.config import BudgetConfig
from moelm.sweep.plan import SweepVariant

RESOLVED_AT_START = ("train.precision", "init_from.checkpoint")
"""Settings whose values auto, last and best are resolved when a run starts."""
TIME_TOLERANCE = 0.1
"""Relative difference from a budget of seconds above which a warning is printed."""


def train_all(variants: Sequence[SweepVariant], processes: int, budget: BudgetConfig | None) -> None:
    """Train every run that is not finished, each followed by its branches: all variants with the first seed, then the next.

    Args:
        processes: of each run.

    Raises:
        MoelmError: a run of the same name has other settings, or a run failed after printing its error.
    """
    order = [
        (variant, seed, steps)
        for seed in variants[0].runs
        for variant in variants
        for steps in (None, *variant.branch_steps)
    ]
    for number, (variant, seed, steps) in enumerate(order, 1):
        run, config = variant.runs[seed], variant.config.model_copy(update={"seed": seed})
        if steps is not None:
            run = variant.branch(seed, steps)
            config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        title = f"[{number}/{len(order)}] {run.path.name}"
        if _is_finished(run, config):
            log(f"{title} is already trained.")
            continue
        log(title)
        nproc = ["--nproc", str(processes)] if processes > 1 else []
        if code := _run_process([sys.executable, "-m", "moelm", *variant.train_arguments(seed, steps), *nproc]):
            error = MoelmError(f"The sweep stopped; run the same command again to continue with {run.path.name}.")
            error.exit_code = code
            raise error
        if steps is None and budget is not None and budget.seconds is not None:
            _check_duration(run, budget.seconds)


def _check_duration(run: RunDirectory, expected: float) -> None:
    last = last_evaluation(run.metrics)
    seconds = last["time_s"] if last else 0.0
    if abs(seconds / expected - 1) > TIME_TOLERANCE:
        warn(f"{run.path.name} trained for {seconds:.0f} s; the budget is {expected:.0f} s.")


def _is_finished(run: RunDirectory, expected: RunConfig) -> bool:
    """Whether a run's last step is evaluated and saved, or all its checkpoints have been removed since.

    Raises:
        MoelmError: the run exists with other settings or data.
    """
    if not run.config.exists():
        return False
    saved, settings = trajectory_settings(load_config(run.config)), trajectory_settings(expected)
    resolved = {key for key in RESOLVED_AT_START if settings.get(key) in ("auto", "last", "best")}
    resolved |= {"model.max_seq_len"} - settings.keys()
    if different := [key for key in differing(saved, settings) if key not in resolved]:
        raise MoelmError(
            f"The run {run.path} exists already with another {', '.join(different[:3])}; give the sweep another name, "
            "or move the run away."
        )
    checkpoints = list_checkpoints(run.checkpoints)
    if checkpoints and step_of(checkpoints[-1]) != expected.train.steps:
        return False
    last = last_evaluation(run.metrics)
    if last is None or last["step"] != expected.train.steps:
        return False
    if (record := read_data_record(run)) is not None:
        check_record(run.path, record, expected.data, folder_to_train_on(expected.data, record)[0])
    return True


def _run_process(command: Sequence[str]) -> int:
    """Run a command to its end; returns its exit code, which is 128 + N after signal N."""
    with _forwarded_signals() as forward_to:
        # In its own session, because a terminal would send Ctrl-C to it in addition. Its stdout is progress here.
        process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
        forward_to(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _forwarded_signals() -> "Iterator[Callable[[subprocess.Popen[bytes]], None]]":
    """Forward stop signals to the process that the yielded function is called with, including those received before."""
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in processes:
            process.send_signal(signum)

    def forward_to(process: "subprocess.Popen[bytes]") -> None:
        processes.append(process)
        for signum in received:
            process.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in stop_signals()}
    try:
        yield forward_to
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
