"""The cost of saving a checkpoint, in duration of the training steps around it.

    python scripts/save_study.py CONFIG [KEY=VALUE]...

Trains 301 steps with a checkpoint every 60, and prints medians relative to an ordinary step: how long a save blocks
training, and the durations of the step with the save and of the next one, while the checkpoint is being written.
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


def record_spans(method_name: str) -> list[tuple[float, float]]:
    """A list that gets the start and end time of every call of a method of the trainer."""
    spans: list[tuple[float, float]] = []
    method = getattr(Trainer, method_name)

    def recorded(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = method(self, *args, **kwargs)
        spans.append((started, time.perf_counter()))
        return result

    setattr(Trainer, method_name, recorded)
    return spans


def main() -> None:
    """Train, and print the durations."""
    steps, saves = record_spans("_step"), record_spans("_save")
    fixed = [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.eval_every=1000"]
    config = load_config(sys.argv[1], ["name=save-study", *sys.argv[2:], *fixed])
    train(config, RunDirectory(Path("runs") / config.name), resume="never")
    durations = [after[0] - before[0] for before, after in itertools.pairwise(steps)]
    ordinary = statistics.median(seconds for index, seconds in enumerate(durations) if (index + 1) % EVERY > 5)
    blocked = statistics.median(end - start for start, end in saves[:-2])
    print(
        f"ordinary step: {1e3 * ordinary:.0f} ms; a save blocks for {1e3 * blocked:.0f} ms, {blocked / ordinary:.2f} steps"
    )
    for offset, name in enumerate(("the step with the save", "the next step")):
        ratio = statistics.median(durations[EVERY - 1 + offset : STEPS - EVERY : EVERY]) / ordinary
        print(f"{name}: {ratio:.2f} times an ordinary step")


if __name__ == "__main__":
    main()
