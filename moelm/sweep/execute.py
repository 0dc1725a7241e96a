"""Training of a sweep's runs, each in its own process with its own memory and allocator, one or several at a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from threading import RLock, Thread
from types import FrameType, TracebackType
from typing import NamedTuple

from moelm.config import RunConfig, differing, load_config, trajectory_settings
from moelm.console import log, warn
from moelm.data.identity import check_record, folder_to_train_on
from moelm.distributed.launcher import count_cpus, stop_signals
from moelm.errors import MoelmError
from moelm.runs.checkpoint import list_checkpoints, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import read_data_record
from moelm.runs.metrics import last_evaluation
from moelm.sweep.config import BudgetConfig
from moelm.sweep.variant import SweepVariant

RESOLVED_AT_START = ("train.precision", "init_from.checkpoint")
"""Settings whose values auto, last and best are resolved when a run starts."""
READ_S = 5.0
"""How long the last lines of a process that has ended are waited for."""
TIME_TOLERANCE = 0.1
"""Relative difference from a budget of seconds above which a warning is printed."""


class _Task(NamedTuple):
    """One run, or a branch of it."""

    variant: SweepVariant
    seed: int
    steps: int | None = None
    """Of a branch."""

    @property
    def run(self) -> RunDirectory:
        """Its directory."""
        return self.variant.runs[self.seed] if self.steps is None else self.variant.branch(self.seed, self.steps)

    @property
    def config(self) -> RunConfig:
        """Its config, but for the name."""
        config = self.variant.config.model_copy(update={"seed": self.seed})
        if self.steps is None:
            return config
        return config.model_copy(update={"train": config.train.model_copy(update={"steps": self.steps})})


def train_all(variants: Sequence[SweepVariant], processes: int, jobs: int, budget: BudgetConfig | None) -> None:
    """Train every run that is not finished, each followed by its branches: all variants with the first seed, then the next.

    Args:
        processes: of each run.
        jobs: runs that are trained at the same time.

    Raises:
        MoelmError: a run of the same name has other settings, or a run failed after printing its error.
    """
    runs = [
        [_Task(variant, seed, steps) for steps in (None, *variant.branch_steps)]
        for seed in dict.fromkeys(seed for variant in variants for seed in variant.runs)
        for variant in variants
        if seed in variant.runs
    ]
    numbers, total = count(1), sum(map(len, runs))
    jobs = min(jobs, len(runs))
    threads = max(1, count_cpus() // (jobs * processes))
    environment = os.environ if jobs == 1 else {"OMP_NUM_THREADS": str(threads), **os.environ}

    def train(task: _Task) -> None:
        title = f"[{next(numbers)}/{total}] {task.run.path.name}"
        if _is_finished(task.run, task.config):
            log(f"{title} is already trained.")
            return
        log(title)
        nproc = ["--nproc", str(processes)] if processes > 1 else []
        command = [sys.executable, "-m", "moelm", *task.variant.train_arguments(task.seed, task.steps), *nproc]
        if code := children.run(command, environment, shows_progress=jobs == 1):
            error = MoelmError(f"The sweep stopped; run the same command again to continue with {task.run.path.name}.")
            error.exit_code = code
            raise error
        if task.steps is None and budget is not None and budget.seconds is not None:
            _check_duration(task.run, budget.seconds)

    def train_in_order(tasks: Sequence[_Task]) -> None:
        for task in tasks:
            if children.stopped:
                return
            try:
                train(task)
            except BaseException:
                children.stop()
                raise

    with _Children() as children, ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(train_in_order, tasks) for tasks in runs]):
            future.result()
    if children.stopped:  # by a signal while no run was being trained
        error = MoelmError("The sweep stopped; run the same command again to continue.")
        error.exit_code = 128 + children.stopped
        raise error


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


class _Children:
    """The processes that are running. The first signal to stop is sent to all of them, and to one that is just starting."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = RLock()  # a signal can arrive while the main thread has it
        self.stopped = 0
        """The first signal, or 0."""

    def __enter__(self) -> "_Children":
        self._previous = {signum: signal.signal(signum, self._forward) for signum in stop_signals()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def run(self, command: Sequence[str], environment: Mapping[str, str], shows_progress: bool) -> int:
        """Run a command to its end; returns its exit code, which is 128 + N after signal N.

        Args:
            shows_progress: whether it has this process's terminal; otherwise its lines are logged.
        """
        stderr = None if shows_progress else subprocess.STDOUT
        stdout = sys.stderr if shows_progress else subprocess.PIPE
        # In its own session, because a terminal would send Ctrl-C to it in addition. Its stdout is progress here.
        with self._lock:
            process = subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=stdout, stderr=stderr, text=True, errors="replace"
            )
            self._processes.add(process)
            if self.stopped:
                process.send_signal(self.stopped)
        reader = Thread(target=_log_lines, args=(process.stdout or (),), daemon=True)
        reader.start()
        code = process.wait()
        reader.join(timeout=READ_S)  # processes that outlive a killed launcher keep its pipe open
        self._processes.discard(process)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ask all processes to save and stop, unless they have been asked already: a second signal would kill them."""
        with self._lock:
            if not self.stopped:
                self._forward(signal.SIGTERM, None)

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        with self._lock:
            self.stopped = self.stopped or signum
            for process in tuple(self._processes):
                process.send_signal(signum)


def _log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        log(line.rstrip("\n"))
