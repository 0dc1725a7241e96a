"""Repeated kills of a run's processes, and a comparison with an uninterrupted run.

    python scripts/kill_study.py CONFIG [KEY=VALUE]... --nproc 2 --kills 50

Trains twice: uninterrupted, and with random processes killed (SIGKILL) at random times, every second time while a
checkpoint is being written; the launcher restarts them. All values of all steps must be equal, except those of time and
memory.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

NOT_COMPARED = ("time_s", "perf/")
"""Prefixes of metrics that vary between runs of the same trajectory."""


def child_pids(pid: int) -> list[int]:
    """The child processes of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def train_command(config: str, overrides: list[str], name: str, nproc: int, max_restarts: int) -> list[str]:
    """The command line of one run."""
    command = [sys.executable, "-m", "moelm", "train", config, *overrides, f"name={name}"]
    return [*command, "--nproc", str(nproc), "--max-restarts", str(max_restarts)]


def run_with_kills(command: list[str], run: Path, kills: int, max_interval: float, rng: random.Random) -> tuple[int, int]:
    """Run a command and kill its children.

    Args:
        max_interval: longest time from one kill to the next, in seconds.

    Returns:
        The number of kills, and how many of them were during a save.
    """
    process = subprocess.Popen(command)
    done = during_save = 0
    last_kill = time.time()

    def is_saving() -> bool:
        with suppress(FileNotFoundError):  # the checkpoint was just finished and renamed
            return any(path.stat().st_mtime > last_kill for path in run.glob("checkpoints/.*.writing-*"))
        return False

    while process.poll() is None and done < kills:
        deadline = time.monotonic() + rng.uniform(0, max_interval)
        while time.monotonic() < deadline and process.poll() is None and not (done % 2 and is_saving()):
            time.sleep(0.002)
        saving = is_saving()
        workers = child_pids(process.pid)
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            last_kill = time.time()
            done, during_save = done + 1, during_save + saving
            print(f"kill {done}{' during a save' if saving else ''}", file=sys.stderr, flush=True)
    if process.wait():
        sys.exit(f"the run ended with exit code {process.returncode} after {done} kills")
    return done, during_save


def compared_metrics(run: Path) -> list[dict[str, object]]:
    """Every line of metrics.jsonl, without the values that may differ."""
    # Not by read_metrics, which merges lines of the same step: a repeated step is a failure here.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(NOT_COMPARED)} for line in lines]


def main() -> None:
    """Train and compare the two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--within", type=float, default=12.0, help="longest time between kills, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    subprocess.run(train_command(options.config, options.overrides, "uninterrupted", options.nproc, 0), check=True)
    command = train_command(options.config, options.overrides, "killed", options.nproc, options.kills + 1)
    rng = random.Random(options.seed)
    done, during_save = run_with_kills(command, Path("runs/killed"), options.kills, options.within, rng)
    equal = compared_metrics(Path("runs/killed")) == compared_metrics(Path("runs/uninterrupted"))
    print(f"{done} kills, {during_save} during a save; metrics of all steps are {'equal' if equal else 'DIFFERENT'}")
    sys.exit(0 if equal and done == options.kills else 1)


if __name__ == "__main__":
    main()
