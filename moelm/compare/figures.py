"""The figures of a comparison: loss against cost, the scaling fit, and the load of the experts."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from moelm.compare.axes import AXIS_NAMES, Axis
from moelm.compare.comparison import Comparison
from moelm.compare.reading import end_costs, final_losses, has_ends
from moelm.compare.scaling import DoublingFit
from moelm.compare.variants import Variant
from moelm.report.figures import COLORS, DASHED, LIGHT, MUTED, legend_label
from moelm.runs.record import Load

LOSS_LABEL = "validation loss (nats per token)"


def draw_comparison(comparison: Comparison) -> Figure:
    """Validation loss against each cost; the range over seeds is a band around their mean.

    The ends of several lengths of a variant are joined by a line, beside the thinner curve of the longest.
    """
    axes = comparison.axes
    figure = Figure(figsize=(3.5 * len(axes), 4.1), layout=ConstrainedLayoutEngine(wspace=0.04))
    panels = figure.subplots(1, len(axes), sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        _draw_losses(panel, comparison, axis)
    panels[0].set_ylabel(LOSS_LABEL)
    panels[0].set_ylim(*_loss_limits(comparison.variants))
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), int(42 * len(axes) / (5 + max(map(len, labels))))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)
    return figure


def draw_scaling(fit: DoublingFit) -> Figure:
    """Final loss against a setting of the experts on a logarithmic axis, and the fit (Shazeer et al. 2017, figure 2)."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, losses in fit.losses.items():
        axes.plot([fit.values[name]] * len(losses), losses, "o", color=COLORS[1], markersize=5, alpha=0.75)
    ticks = sorted(set(fit.values.values()))
    ends = np.array([ticks[0], ticks[-1]])
    line = fit.loss_at_1 + fit.slope * np.log2(ends)
    label = f"{fit.slope:+.3f} nats for each doubling"
    axes.plot(ends, line, color=COLORS[2], linewidth=1.5, linestyle=DASHED, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{round(value, 2):g}" for value in ticks])
    axes.minorticks_off()
    axes.set_title(f"Final loss by {fit.description}")
    axes.set_xlabel(fit.setting.replace("_", "-"))
    axes.set_ylabel(LOSS_LABEL)
    axes.legend()
    return figure


def draw_expert_load(loads: Sequence[tuple[str, Load]]) -> Figure:
    """How evenly each MoE variant used its experts: the busiest expert over time, and all experts at the end."""
    figure = Figure(figsize=(10.5, 3.6 * len(loads)), layout="constrained")
    rows = figure.subplots(len(loads), 2, squeeze=False, width_ratios=(1.15, 1))
    for (name, load), (left, right) in zip(loads, rows, strict=True):
        _draw_load_over_time(left, name, load)
        _draw_final_load(figure, right, name, load)
    return figure


def _draw_losses(panel: Axes, comparison: Comparison, axis: Axis) -> None:
    costs = [variant.cost(axis) for variant in comparison.variants]
    scale, label = _scale_and_label(axis, max(float(cost[-1]) for cost in costs))
    for i, (variant, cost) in enumerate(zip(comparison.variants, costs, strict=True)):
        line = "-" if i < len(COLORS) else "--"
        color = COLORS[i % len(COLORS)]
        joined = has_ends(variant, axis)
        x, losses_SN = _joined_ends(variant, axis) if joined else (cost, variant.losses)
        if joined:
            panel.plot(cost / scale, variant.val.loss, line, color=color, linewidth=1)
        panel.plot(x / scale, losses_SN.mean(axis=0), line, color=color, linewidth=2, label=legend_label(variant.name))
        if len(variant.runs) > 1:
            low, high = losses_SN.min(axis=0), losses_SN.max(axis=0)
            panel.fill_between(x / scale, low, high, color=color, alpha=0.2, linewidth=0)
        panel.plot(end_costs(variant, axis) / scale, final_losses(variant).mean(axis=1), "o", color=color, markersize=5)
    panel.set_title(f"By {AXIS_NAMES[axis]}")
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.margins(x=0.03)
    _draw_cost_to_reach(panel, comparison, axis, scale)


def _joined_ends(variant: Variant, axis: Axis) -> tuple[NDArray[Any], NDArray[Any]]:
    """Costs `(N,)` from the end of the shortest length to that of the longest, and the losses `(S, N)` read there."""
    ends = end_costs(variant, axis)
    costs = np.unique(np.concatenate([ends, np.geomspace(ends[0], ends[-1], 50)]).clip(ends[0], ends[-1]))
    losses_LS = final_losses(variant)
    return costs, np.stack([np.interp(np.log(costs), np.log(ends), each) for each in losses_LS.T])


def _draw_cost_to_reach(panel: Axes, comparison: Comparison, axis: Axis, scale: float) -> None:
    """The reference's final loss, and the point where the challenger reaches it."""
    reference = comparison.variants[0].name
    pair = comparison.pair(comparison.challenger, reference)
    label = f"final loss of {reference} ({pair.target_loss:.3f})"
    panel.axhline(pair.target_loss, color=MUTED, linewidth=1, linestyle=DASHED, zorder=1, label=label)
    reached = pair.cost_to_reach[axis]
    if reached.cost is None or reached.ratio is None:
        return
    x = reached.cost / scale
    text_color, background = mpl.rcParams["text.color"], mpl.rcParams["axes.facecolor"]
    panel.plot(x, pair.target_loss, "o", markersize=7, markerfacecolor=background, markeredgecolor=text_color, zorder=4)
    if x > 0.35 * panel.get_xlim()[1]:  # further left, the text would not fit into the panel
        text = f"{'≥ ' if reached.at_most else ''}{reached.ratio:.2f}× {'sooner' if reached.ratio >= 1 else '(later)'}"
        if f"{reached.ratio:.2f}" == "1.00":
            text = "as soon"
        panel.annotate(text, (x, pair.target_loss), (-7, -6), textcoords="offset points", ha="right", va="top")


def _scale_and_label(axis: Axis, largest: float) -> tuple[float, str]:
    """The number by which costs on an axis are divided, and its label."""
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


def _loss_limits(variants: Sequence[Variant]) -> tuple[float, float]:
    """Limits of the loss axis, without the steep first eighth of each run."""
    late = [variant.losses[:, variant.val.tokens >= variant.val.tokens[-1] / 8].ravel() for variant in variants]
    losses = np.concatenate(late)
    low, high = float(losses.min()), float(losses.max())
    pad = 0.06 * (high - low) or 0.05
    return low - 2 * pad, high + pad


def _draw_load_over_time(axes: Axes, name: str, load: Load) -> None:
    colors = mpl.colormaps["viridis"](np.linspace(0.25, 0.9, len(load.layers)))
    for i, layer in enumerate(load.layers):
        steps, peak = _chunk_means(load.steps), _chunk_means(load.max_over_mean[:, i])
        axes.plot(steps, peak, color=colors[i], linewidth=1.5, label=f"layer {layer}")
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=DASHED)
    axes.set_title(f"{name}: busiest expert")
    axes.set_xlabel("step")
    axes.set_ylabel("max / mean load of a batch")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0.9)
    if len(load.layers) <= 12:
        axes.legend(ncols=2 if len(load.layers) > 4 else 1, fontsize=9, loc="upper right")


def _chunk_means(values: NDArray[Any], chunks: int = 100) -> NDArray[Any]:
    """Means over at most so many chunks: the noise of single batches exceeds the differences between layers."""
    return np.asarray([chunk.mean() for chunk in np.array_split(values, min(chunks, len(values)))])


def _draw_final_load(figure: Figure, axes: Axes, name: str, load: Load) -> None:
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
            color = "white" if abs(value - 1) > 0.6 else LIGHT.text
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=color)
    bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.05, pad=0.02)
    bar.set_label("load / mean")
    bar.outline.set_visible(False)
