"""Kill processes of a run again and again, and show that it ends as if nobody had.

    python scripts/kill_study.py CONFIG [KEY=VALUE]... --nproc 2 --kills 50

Trains twice: once in peace, and once while random processes are killed (SIGKILL) at random times, every other time in the
middle of a save; the launcher starts them anew each time. Every figure of every step must be the same in both.
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

TIMES = ("time_s", "perf/tokens_per_s", "perf/mfu", "perf/memory_peak_bytes")


def workers_of(launcher: int) -> list[int]:
    """Process numbers of a launcher's children."""
    try:
        return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    except FileNotFoundError:
        return []


def command(config: str, settings: list[str], name: str, nproc: int, restarts: int) -> list[str]:
    """How the run is started."""
    words = [sys.executable, "-m", "moelm", "train", config, *settings, f"name={name}"]
    return [*words, "--nproc", str(nproc), "--max-restarts", str(restarts)]


def torment(words: list[str], run: Path, kills: int, within: float, dice: random.Random) -> tuple[int, int]:
    """Run a command while killing its children; returns how many were killed, and how many of these during a save.

    Args:
        within: longest time from one kill to the next, in seconds.
    """
    process = subprocess.Popen(words)
    done = in_saves = 0
    killed = time.time()

    def saving() -> bool:
        with suppress(FileNotFoundError):  # it is finished, and has got its real name
            return any(path.stat().st_mtime > killed for path in run.glob("checkpoints/.*.writing"))
        return False

    while process.poll() is None and done < kills:
        until = time.monotonic() + dice.uniform(0, within)
        while time.monotonic() < until and process.poll() is None and not (done % 2 and saving()):
            time.sleep(0.002)
        caught = saving()
        workers = workers_of(process.pid)
        if workers:
            os.kill(dice.choice(workers), signal.SIGKILL)
            killed = time.time()
            done, in_saves = done + 1, in_saves + caught
            print(f"kill {done}{' in a save' if caught else ''}", file=sys.stderr, flush=True)
    if process.wait():
        sys.exit(f"the run ended with exit code {process.returncode} after {done} kills")
    return done, in_saves


def figures(run: Path) -> list[dict[str, object]]:
    """Every step's figures but those of time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def main() -> None:
    """Compare the two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--within", type=float, default=12.0, help="longest time between kills, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    subprocess.run(command(options.config, options.settings, "in-peace", options.nproc, 0), check=True)
    words = command(options.config, options.settings, "killed", options.nproc, options.kills + 1)
    done, in_saves = torment(words, Path("runs/killed"), options.kills, options.within, random.Random(options.seed))
    same = figures(Path("runs/killed")) == figures(Path("runs/in-peace"))
    print(f"{done} kills, {in_saves} of them in a save; all figures of all steps {'equal' if same else 'DIFFER'}")
    sys.exit(0 if same and done == options.kills else 1)


if __name__ == "__main__":
    main()
