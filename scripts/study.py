"""Shared by the studies: configs at other widths; variants trained on the same batches, their losses and expert load."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moelm.atomic import atomic_file
from moelm.config import RunConfig, load_config
from moelm.report.figures import render_light_and_dark
from moelm.runs.directory import RunDirectory
from moelm.runs.metrics import read_metrics
from moelm.train.setup import train

Lines = list[dict[str, Any]]
LAST_FRACTION = 0.1
"""The last part of a run, over which metrics and load are averaged."""


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
        """Mean of a metric over the last steps, each of which describes a single batch."""
        return float(np.mean([line[key] for line in self._last_lines()]))

    def load(self) -> NDArray[np.float64]:
        """Each expert's share of the assignments over the last steps, `(layers, experts)`."""
        steps = [[layer["load"] for layer in line["moe/layers"]] for line in self._last_lines()]
        load: NDArray[np.float64] = np.asarray(steps).mean(axis=0)
        return load

    def _last_lines(self) -> Lines:
        return self.lines[-max(1, round(LAST_FRACTION * len(self.lines))) :]


def width_parser(description: str | None, widths: str, seeds: int) -> argparse.ArgumentParser:
    """The arguments of studies that train configs at several widths."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help="configs whose model.dim is the base width")
    parser.add_argument("--widths", default=widths)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of all configs")
    parser.add_argument("--out", type=Path, help="folder of the figure")
    return parser


def write_figure(path: Path, draw: Callable[[], Figure]) -> None:
    """Write a figure as PNG, in the style of reports on light pages."""
    light, _ = render_light_and_dark(draw)
    with atomic_file(path) as temporary:
        temporary.write_bytes(light)


def width_overrides(config: RunConfig, dim: int, parametrization: str) -> list[str]:
    """The overrides that give a config another width; heads keep their size, and `mup` has the config as its base."""
    model, ffn = config.model, config.model.ffn
    hidden_dim = max(1, round(ffn.hidden_dim * dim / model.dim / ffn.depth)) * ffn.depth
    return [
        f"model.dim={dim}",
        f"model.head_dim={model.size_per_head}",
        f"model.num_heads={max(1, dim // model.size_per_head)}",
        f"model.ffn.hidden_dim={hidden_dim}",
        f"model.parametrization={parametrization}",
        *([f"model.base_dim={model.dim}"] if parametrization == "mup" else []),
    ]


def run_variants(config: Path, variants: dict[str, Sequence[str]], overrides: Sequence[str]) -> list[Variant]:
    """Train each variant, or continue it; a finished one is only read.

    Args:
        variants: overrides by label.
        overrides: for all variants.
    """
    base = load_config(config, overrides).name
    trained = []
    for label, own in variants.items():
        resolved = load_config(config, [*overrides, *own, f"name={base}-{label}"])
        run = RunDirectory(Path("runs") / resolved.name)
        train(resolved, run)
        trained.append(Variant(label, read_metrics(run.metrics)))
    return trained


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])
