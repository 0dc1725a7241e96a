"""The pictures of a comparison: loss against cost, what a doubling brings, and the load of the experts.

Figures are drawn without pyplot, so nothing here touches global state or needs a display.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from moelm.analysis.compare import Comparison
from moelm.analysis.contestants import AXIS_NAMES, Axis, Contestant
from moelm.analysis.runs import Load
from moelm.analysis.trends import Trend

COLOURS = ("#7b8794", "#d1495b", "#3a86b7", "#e09f3e", "#5a9f4e", "#8f6cc0", "#3aa6a0", "#b5652f")
"""The reference is grey, for it is what the others are measured against."""
INK, QUIET = "#1f2933", "#7b8794"
DPI = 160


class Light(NamedTuple):
    """Colours of the ground and of what is written on it."""

    paper: str
    ink: str
    grid: str


DAY, NIGHT = Light("#ffffff", INK, "#e4e7eb"), Light("#15191e", "#e4e7eb", "#2b343d")


def style(light: Light) -> Any:
    """Settings of matplotlib."""
    return {
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": QUIET,
        "axes.facecolor": light.paper,
        "figure.facecolor": light.paper,
        "axes.labelcolor": light.ink,
        "axes.titlecolor": light.ink,
        "axes.grid": True,
        "grid.color": light.grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": light.ink,
        "ytick.labelcolor": light.ink,
        "legend.frameon": False,
        "text.color": light.ink,
        "text.parse_math": False,
    }


STYLE = style(DAY)


def in_both_lights(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """A picture as PNG, for light and for dark pages."""
    found = []
    for light in (DAY, NIGHT):
        with mpl.rc_context(style(light)):
            file = io.BytesIO()
            draw().savefig(file, dpi=DPI, format="png")
            found.append(file.getvalue())
    return found[0], found[1]


def draw_comparison(comparison: Comparison) -> Figure:
    """Validation loss against each cost side by side; seeds as a band around their mean."""
    axes = comparison.axes
    figure = Figure(figsize=(3.5 * len(axes), 4.1), layout=ConstrainedLayoutEngine(wspace=0.04))
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        _panel(panel, comparison, axis)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].set_ylim(*_visible(comparison.contestants))
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), int(42 * len(axes) / (5 + max(map(len, labels))))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)
    return figure


def draw_trend(trend: Trend) -> Figure:
    """Final loss by a setting of the experts, on a logarithmic axis, and a line (Shazeer et al. 2017, figure 2)."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = figure.subplots()
    values = np.array(trend.values)
    for value, losses in zip(trend.values, trend.losses, strict=True):
        axes.plot([value] * len(losses), losses, "o", color=COLOURS[1], markersize=5, alpha=0.75)
    ends = np.array([values.min(), values.max()])
    label = f"{trend.slope:+.3f} nats for each doubling"
    line = trend.at_one + trend.slope * np.log2(ends)
    axes.plot(ends, line, color=COLOURS[2], linewidth=1.5, linestyle=(0, (4, 3)), label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(trend.values)), [f"{value:g}" for value in sorted(set(trend.values))])
    axes.minorticks_off()
    axes.set_title(f"Final loss by {trend.noun}")
    axes.set_xlabel(trend.what.replace("_", "-"))
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    return figure


def draw_load(sparse: Sequence[tuple[str, Load]]) -> Figure:
    """How evenly each mixture used its experts."""
    figure = Figure(figsize=(10.5, 3.6 * len(sparse)), layout="constrained")
    rows = figure.subplots(len(sparse), 2, squeeze=False, width_ratios=(1.15, 1))
    for (name, load), (left, right) in zip(sparse, rows, strict=True):
        _load_over_time(left, name, load)
        _final_load(figure, right, name, load)
    return figure


def _panel(axes: Axes, comparison: Comparison, axis: Axis) -> None:
    costs = [each.cost(axis) for each in comparison.contestants]
    scale, label = _unit(axis, max(float(cost[-1]) for cost in costs))
    for i, (each, cost) in enumerate(zip(comparison.contestants, costs, strict=True)):
        line = "-" if i < len(COLOURS) else "--"
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(cost / scale, each.val.loss, line, color=colour, linewidth=2, label=each.name)
        if len(each.runs) > 1:
            low, high = each.losses.min(axis=0), each.losses.max(axis=0)
            axes.fill_between(cost / scale, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(cost[-1] / scale, each.val.loss[-1], "o", color=colour, markersize=5)
    axes.set_title(f"By {AXIS_NAMES[axis]}")
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.margins(x=0.03)
    _guide(axes, comparison, axis, scale)


def _guide(axes: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    """The reference's final loss, and where the challenger comes down to it."""
    reference = comparison.contestants[0].name
    pair = comparison.pair(comparison.challenger, reference)
    words = f"final loss of {reference} ({pair.target:.3f})"
    axes.axhline(pair.target, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=words)
    need = pair.needs[axis]
    if need.need is None or need.ratio is None:
        return
    x = need.need / scale
    ink, paper = mpl.rcParams["text.color"], mpl.rcParams["axes.facecolor"]
    axes.plot(x, pair.target, "o", markersize=7, markerfacecolor=paper, markeredgecolor=ink, zorder=4)
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
    if axis == "dollars":
        return 1.0, "dollars"
    if axis == "tokens":
        for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
            if largest >= size:
                return size, f"tokens ({name})"
        return 1.0, "tokens"
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    return 10.0**power, f"training FLOPs (1e{power})"


def _visible(contestants: Sequence[Contestant]) -> tuple[float, float]:
    """Leave out the steep first eighth of each run, which would flatten all that is worth seeing."""
    late = np.concatenate([each.losses[:, each.val.tokens >= each.val.tokens[-1] / 8].ravel() for each in contestants])
    low, high = float(late.min()), float(late.max())
    pad = 0.06 * (high - low) or 0.05
    return low - 2 * pad, high + pad


def _load_over_time(axes: Axes, name: str, load: Load) -> None:
    shades = mpl.colormaps["viridis"](np.linspace(0.25, 0.9, len(load.layers)))
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
    if relative.size <= 128 and relative.shape[1] <= 10:
        axes.set_xticks(range(relative.shape[1]))
        for (row, column), value in np.ndenumerate(relative):
            ink = "white" if abs(value - 1) > 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=ink)
    bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.05, pad=0.02)
    bar.set_label("load / mean")
    bar.outline.set_visible(False)
