"""What saving costs the steps of training around it.

    python scripts/save_study.py CONFIG [KEY=VALUE]...

Trains 301 steps, saving every 60, and prints medians as parts of an ordinary step: how long a save holds training up, the
step with the save, and the one after it, while the checkpoint is still being written.
"""

import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from moelm.config import load_config
from moelm.runs.directory import RunDirectory
from moelm.train.setup import train
from moelm.train.trainer import Trainer

EVERY, STEPS = 60, 301


def timed(name: str, spans: list[tuple[float, float]]) -> None:
    """Note when a method of the trainer begins and ends."""
    method = getattr(Trainer, name)

    def noted(self: Trainer, *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = method(self, *arguments, **options)
        spans.append((begun, time.perf_counter()))
        return result

    setattr(Trainer, name, noted)


def main() -> None:
    """Train and print."""
    steps: list[tuple[float, float]] = []
    saves: list[tuple[float, float]] = []
    timed("_step", steps)
    timed("_save", saves)
    words = [*sys.argv[2:], f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.eval_every=1000"]
    config = load_config(sys.argv[1], ["name=save-study", *words])
    train(config, RunDirectory(Path("runs") / config.name), resume="never")
    took = [after[0] - before[0] for before, after in itertools.pairwise(steps)]
    ordinary = statistics.median(seconds for step, seconds in enumerate(took) if (step + 1) % EVERY > 5)
    held = statistics.median(end - begun for begun, end in saves[:-2])
    print(f"ordinary step {1e3 * ordinary:.0f} ms; a save holds it up for {1e3 * held:.0f} ms, {held / ordinary:.2f} of it")
    for place, name in enumerate(("the step with the save", "the one after it")):
        ratio = statistics.median(took[EVERY - 1 + place : STEPS - EVERY : EVERY]) / ordinary
        print(f"{name} takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
