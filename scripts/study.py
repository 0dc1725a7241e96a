"""What the studies share: variants of one config trained on the same batches, and their load read from the metrics."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moelm.config import load_config
from moelm.runs.directory import RunDirectory
from moelm.train.setup import train

Lines = list[dict[str, Any]]
LAST = 0.1
"""Part of the run, at its end, over which load is averaged."""


class Variant(NamedTuple):
    """One row of a study."""

    label: str
    lines: Lines
    """metrics.jsonl."""

    @property
    def val_loss(self) -> float:
        """The last validation loss, nats per token."""
        return float(next(line["val/loss"] for line in reversed(self.lines) if "val/loss" in line))

    def mean(self, key: str) -> float:
        """Mean of a figure over the end of the run, each step's batch on its own."""
        return float(np.mean([line[key] for line in self._end()]))

    def load(self) -> NDArray[np.float64]:
        """Share of all assignments that each expert got over the end of the run, `(layers, experts)`."""
        steps = [[layer["load"] for layer in line["moe/layers"]] for line in self._end()]
        return np.asarray(steps).mean(axis=0)

    def _end(self) -> Lines:
        return self.lines[-max(1, round(LAST * len(self.lines))) :]


def run_variants(config: Path, variants: dict[str, Sequence[str]], overrides: Sequence[str]) -> list[Variant]:
    """Train each variant, or go on with it; a finished one is only read.

    Args:
        variants: overrides by label.
        overrides: those that all share.
    """
    done = []
    base = load_config(config, overrides).name
    for label, words in variants.items():
        wanted = load_config(config, [*overrides, *words, f"name={base}-{label}"])
        run = RunDirectory(Path("runs") / wanted.name)
        train(wanted, run)
        with run.metrics.open(encoding="utf-8") as file:
            done.append(Variant(label, [json.loads(line) for line in file]))
    return done


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned."""
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad: Callable[[Sequence[str]], str] = lambda row: (  # noqa: E731
        "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, width, strict=True)) + " |"
    )
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in width) + "|"
    return "\n".join([pad(head), rule, *map(pad, rows)])
