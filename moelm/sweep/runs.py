"""Training a sweep's runs one after another, each in a process of its own: its memory and its allocator are then its own
too."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from moelm.config import RunConfig, load_config
from moelm.console import console
from moelm.errors import MoelmError
from moelm.rundir import RunDirectory
from moelm.sweep.plan import Entry
from moelm.train.launch import identity

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a run is asked to save and stop by; handed on to it."""


def train_all(entries: Sequence[Entry], processes: int) -> None:
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


def _finished(run: RunDirectory, wanted: RunConfig) -> bool:
    """Whether a run has taken its last step and was evaluated there.

    Raises:
        MoelmError: it is there with other settings.
    """
    if not run.config.exists():
        return False
    saved, asked = identity(load_config(run.config)), identity(wanted)
    # What is left open is settled when a run begins.
    settled = {key for key, value in asked.items() if value == "auto"} | saved.keys() - asked.keys()
    different = sorted(
        key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key) and key not in settled
    )
    if different:
        raise MoelmError(
            f"The run {run.path} exists already with another {', '.join(different[:3])}; give the sweep another name, "
            "or move the run away."
        )
    return _last_line(run).get("step") == wanted.train.steps


def _last_line(run: RunDirectory) -> dict[str, Any]:
    """The newest line with a validation loss."""
    found: dict[str, Any] = {}
    if run.metrics.exists():
        for text in run.metrics.read_text(encoding="utf-8").splitlines():
            if '"val/loss"' in text and text.endswith("}"):
                found = json.loads(text)
    return found


def _run(command: Sequence[str]) -> int:
    """Run a command to its end, handing on signals; its exit code, as a shell would tell it."""
    # In a session of its own, so that a Ctrl-C comes by way of us, and once; what it says is progress here.
    process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
    with _handing_on(process):
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _handing_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    def hand_on(signum: int, frame: FrameType | None) -> None:
        process.send_signal(signum)

    before = {signum: signal.signal(signum, hand_on) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
