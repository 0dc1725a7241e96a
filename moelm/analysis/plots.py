"""The pictures of a comparison: loss against cost, and the load of the experts.

Figures are drawn without pyplot, so nothing here touches global state or needs a display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from moelm.analysis.compare import AXES, AXIS_NAMES, Axis, Comparison
from moelm.analysis.runs import Load, RunRecord

COLOURS = ("#6b7280", "#d1495b", "#2a6f97", "#e09f3e", "#5a8f4e", "#7b5ea7", "#3aa6a0", "#a0522d")
"""The reference is grey, for it is what the others are measured against."""
INK, QUIET = "#1f2933", "#7b8794"
STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
}
DPI = 160


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw validation loss against tokens, FLOPs and seconds side by side."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.1), layout=ConstrainedLayoutEngine(wspace=0.04))
        panels = figure.subplots(1, 3, sharey=True)
        for axes, axis in zip(panels, AXES, strict=True):
            _panel(axes, comparison, axis)
        panels[0].set_ylabel("validation loss (nats per token)")
        panels[0].set_ylim(*_visible(comparison.runs))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), handlelength=1.6)
        figure.savefig(path, dpi=DPI)


def plot_load(runs: Sequence[RunRecord], path: Path) -> bool:
    """Draw how evenly each MoE run used its experts; False, and no file, when all runs are dense."""
    sparse = [(run.name, run.load) for run in runs if run.load is not None]
    if not sparse:
        return False
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6 * len(sparse)), layout="constrained")
        rows = figure.subplots(len(sparse), 2, squeeze=False, width_ratios=(1.15, 1))
        for (name, load), (left, right) in zip(sparse, rows, strict=True):
            _load_over_time(left, name, load)
            _final_load(figure, right, name, load)
        figure.savefig(path, dpi=DPI)
    return True


def _panel(axes: Axes, comparison: Comparison, axis: Axis) -> None:
    costs = [getattr(run.val, axis) for run in comparison.runs]
    scale, label = _unit(axis, max(float(cost[-1]) for cost in costs))
    for i, (run, cost) in enumerate(zip(comparison.runs, costs, strict=True)):
        style = "-" if i < len(COLOURS) else "--"
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(cost / scale, run.val.loss, style, color=colour, linewidth=2, label=run.name)
        axes.plot(cost[-1] / scale, run.val.loss[-1], "o", color=colour, markersize=5)
    axes.set_title(f"By {AXIS_NAMES[axis]}")
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.margins(x=0.03)
    _guide(axes, comparison, axis, scale)


def _guide(axes: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    """The reference's final loss, and where the challenger comes down to it."""
    reference = comparison.runs[0].name
    pair = comparison.pair(comparison.challenger, reference)
    words = f"final loss of {reference} ({pair.target:.3f})"
    axes.axhline(pair.target, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=words)
    need = pair.needs[axis]
    if need.need is None or need.ratio is None:
        return
    x = need.need / scale
    axes.plot(x, pair.target, "o", markersize=7, markerfacecolor="white", markeredgecolor=INK, zorder=4)
    if x > 0.35 * axes.get_xlim()[1]:  # further left the words would run out of the panel
        words = f"{need.ratio:.2f}× {'sooner' if need.ratio >= 1 else '(later)'}"
        axes.annotate(words, (x, pair.target), xytext=(-7, -6), textcoords="offset points", ha="right", va="top")


def _unit(axis: Axis, largest: float) -> tuple[float, str]:
    """What to divide an axis by, and its label."""
    if axis == "seconds":
        for size, name in ((3600.0, "hours"), (60.0, "minutes")):
            if largest >= 2 * size:
                return size, f"training time ({name})"
        return 1.0, "training time (seconds)"
    if axis == "tokens":
        for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
            if largest >= size:
                return size, f"tokens ({name})"
        return 1.0, "tokens"
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    return 10.0**power, f"training FLOPs (1e{power})"


def _visible(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """Leave out the steep first eighth of each run, which would flatten all that is worth seeing."""
    late = np.concatenate([run.val.loss[run.val.tokens >= run.val.tokens[-1] / 8] for run in runs])
    low, high = float(late.min()), float(late.max())
    pad = 0.06 * (high - low) or 0.05
    return low - 2 * pad, high + pad


def _load_over_time(axes: Axes, name: str, load: Load) -> None:
    shades = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(load.layers)))
    for i, layer in enumerate(load.layers):
        steps, peak = _in_stretches(load.steps, load.max_over_mean[:, i])
        axes.plot(steps, peak, color=shades[i], linewidth=1.5, label=f"layer {layer}")
    axes.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(f"{name}: busiest expert")
    axes.set_xlabel("step")
    axes.set_ylabel("max / mean load of a batch")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0.9)
    if len(load.layers) <= 12:
        axes.legend(ncols=2 if len(load.layers) > 4 else 1, fontsize=9, loc="upper right")


def _in_stretches(steps: NDArray[Any], values: NDArray[Any], most: int = 100) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means over at most so many stretches of equal length: single batches scatter more than layers differ."""
    parts = min(most, len(steps))
    means = [[part.mean() for part in np.array_split(each, parts)] for each in (steps, values)]
    return np.asarray(means[0]), np.asarray(means[1])


def _final_load(figure: Figure, axes: Axes, name: str, load: Load) -> None:
    relative = load.share[-1] * load.share.shape[-1]
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=2)
    image = axes.imshow(relative, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(f"{name}: load at step {load.steps[-1]:,.0f}")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(load.layers)), [str(layer) for layer in load.layers])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if relative.size <= 128 and relative.shape[1] <= 16:
        axes.set_xticks(range(relative.shape[1]))
        for (row, column), value in np.ndenumerate(relative):
            ink = "white" if abs(value - 1) > 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=ink)
    bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.05, pad=0.02)
    bar.set_label("load / mean")
    bar.outline.set_visible(False)
