"""Training a sweep's runs one after another, each in a process of its own: its memory and its allocator are then its own
too."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from moelm.checkpoint import list_checkpoints, step_of
from moelm.config import RunConfig, differing, identity, load_config
from moelm.console import console
from moelm.errors import MoelmError
from moelm.rundir import RunDirectory
from moelm.sweep.plan import Entry
from moelm.sweep.schema import BudgetConfig

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a run is asked to save and stop by; handed on to it."""
SETTLED = ("train.precision", "start.checkpoint")
"""Settings that may be left to be settled by the run."""
MISSED = 0.1
"""Relative distance from a budget of seconds that is told."""


def train_all(entries: Sequence[Entry], processes: int, budget: BudgetConfig | None) -> None:
    """Train every run that is not finished; the first seed of all contestants comes first.

    Args:
        processes: for each run.

    Raises:
        MoelmError: a run of that name with other settings, or one that did not end well; it has said why.
    """
    seeds = list(entries[0].runs)
    order = [(entry, seed) for seed in seeds for entry in entries]
    for number, (entry, seed) in enumerate(order, 1):
        run = entry.runs[seed]
        place = f"[{number}/{len(order)}] {run.path.name}"
        if _finished(run, entry.config.model_copy(update={"seed": seed})):
            console.print(f"{place} is trained already.", soft_wrap=True, markup=False)
            continue
        console.print(place, soft_wrap=True, markup=False)
        words = [*entry.command(seed), *(["--nproc", str(processes)] if processes > 1 else [])]
        if code := _run([sys.executable, "-m", "moelm", *words]):
            error = MoelmError(f"The sweep ends here; give the same command again to go on with {run.path.name}.")
            error.exit_code = code
            raise error
        took = _last_line(run).get("time_s", 0.0)
        if budget is not None and budget.seconds is not None and abs(took / budget.seconds - 1) > MISSED:
            console.print(
                f"Warning: {run.path.name} took {took:.0f} s of training, not {budget.seconds:.0f} s.", soft_wrap=True
            )


def _finished(run: RunDirectory, wanted: RunConfig) -> bool:
    """Whether a run has taken its last step, was evaluated there, and has saved it (or its owner has put all away).

    Raises:
        MoelmError: it is there with other settings.
    """
    if not run.config.exists():
        return False
    saved, asked = identity(load_config(run.config)), identity(wanted)
    # Settled when a run begins.
    settled = {"model.max_seq_len"} - asked.keys() | {key for key in SETTLED if asked.get(key) in ("auto", "last", "best")}
    different = [key for key in differing(saved, asked) if key not in settled]
    if different:
        raise MoelmError(
            f"The run {run.path} exists already with another {', '.join(different[:3])}; give the sweep another name, "
            "or move the run away."
        )
    saved_steps = [step_of(path) for path in list_checkpoints(run.checkpoints)]
    return _last_line(run).get("step") == wanted.train.steps and saved_steps[-1:] in ([wanted.train.steps], [])


def _last_line(run: RunDirectory) -> dict[str, Any]:
    """The newest line with a validation loss."""
    found: dict[str, Any] = {}
    if run.metrics.exists():
        for text in run.metrics.read_text(encoding="utf-8").splitlines():
            if '"val/loss"' in text and text.endswith("}"):
                try:
                    found = json.loads(text)
                except json.JSONDecodeError as error:
                    raise MoelmError(f"{run.metrics} has a line that is not JSON: {error.msg}.") from None
    return found


def _run(command: Sequence[str]) -> int:
    """Run a command to its end, handing on signals; its exit code, as a shell would tell it."""
    with _signals() as hand_to:
        # In a session of its own, so that a Ctrl-C comes by way of us, and once; what it says is progress here.
        process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
        hand_to(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _signals() -> "Iterator[Callable[[subprocess.Popen[bytes]], None]]":
    """Catch signals for a process that is about to start, and hand them on to it once it has."""
    processes: list[subprocess.Popen[bytes]] = []
    caught: list[int] = []

    def catch(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        for process in processes:
            process.send_signal(signum)

    def hand_to(process: "subprocess.Popen[bytes]") -> None:
        processes.append(process)
        for signum in caught:
            process.send_signal(signum)

    before = {signum: signal.signal(signum, catch) for signum in SIGNALS}
    try:
        yield hand_to
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
