"""The figures of a ladder: loss against cost with the fits, and the multiplier against cost."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moelm.compare.axes import Axis, format_cost
from moelm.compare.bootstrap import CONFIDENCE
from moelm.compare.figures import LOSS_LABEL
from moelm.compare.ladder.comparison import AxisResult, LadderComparison, axis_title
from moelm.compare.ladder.multiplier import cost_of_loss, log_multipliers, resampled_log_multipliers
from moelm.compare.ladder.points import Points
from moelm.report.figures import COLORS, DASHED, MUTED, legend_label
from moelm.runs.record import Array

GRID = 60
"""Points of a curve."""
BEYOND = 10.0
"""How far fits are drawn, relative to the largest measured cost."""


def draw_ladder(comparison: LadderComparison) -> Figure:
    """Loss against each cost, both logarithmic; the curves that multipliers are read from, and the fits dashed."""
    figure = Figure(figsize=(10.5, 4.1), layout="constrained")
    panels = figure.subplots(1, len(comparison.results), sharey=True, squeeze=False)[0]
    for panel, result in zip(panels, comparison.results, strict=True):
        _draw_losses(panel, comparison, result)
    panels[0].set_ylabel(LOSS_LABEL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, handlelength=1.6)
    return figure


def draw_multipliers(comparison: LadderComparison) -> Figure:
    """The multiplier of each side against its own cost, with its 95% interval; the fits' dashed."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(comparison.results), sharey=True, squeeze=False)[0]
    for panel, result in zip(panels, comparison.results, strict=True):
        _draw_multipliers(panel, comparison, result)
    panels[0].set_ylabel(f"times the cost of {comparison.ladder.sides[0].name}")
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, handlelength=1.6)
    return figure


def _draw_losses(panel: Axes, comparison: LadderComparison, result: AxisResult) -> None:
    for i, (side, points) in enumerate(zip(comparison.ladder.sides, result.points, strict=True)):
        color = COLORS[i % len(COLORS)]
        losses_Q = _losses_between(points)
        costs_Q = cost_of_loss(points.costs_P, points.losses_P, losses_Q)
        panel.plot(np.exp(costs_Q), np.exp(losses_Q), color=color, linewidth=2, label=legend_label(side.name))
        panel.plot(np.exp(points.costs_P), np.exp(points.losses_P), "o", color=color, markersize=5)
        for variant, cost in zip(side.sizes.values(), points.costs_P, strict=True):
            panel.plot([np.exp(cost)] * len(variant.runs), variant.final_losses, "_", color=color, markersize=7)
        if result.fit is not None:
            costs = np.geomspace(np.exp(points.costs_P[0]), BEYOND * np.exp(points.costs_P[-1]), GRID)
            label = "fits" if i == len(result.points) - 1 else None
            panel.plot(costs, result.fit.laws[i].loss(costs), color=color, linewidth=1, linestyle=DASHED, label=label)
    _style_costs(panel, result.axis)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    panel.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _draw_multipliers(panel: Axes, comparison: LadderComparison, result: AxisResult) -> None:
    panel.axhline(1, color=MUTED, linewidth=1, linestyle=DASHED, zorder=1)
    reference = result.points[0]
    for i, side in enumerate(comparison.ladder.sides[1:], start=1):
        color, points = COLORS[i % len(COLORS)], result.points[i]
        losses_Q = _losses_between(points)
        costs_Q = cost_of_loss(points.costs_P, points.losses_P, losses_Q)
        logs_Q = log_multipliers(reference, losses_Q, costs_Q)
        low_Q, high_Q = band(reference, points, costs_Q, logs_Q)
        x = np.exp(costs_Q)
        panel.plot(x, _finite(np.exp(logs_Q)), color=color, linewidth=2, label=legend_label(side.name))
        label = f"{CONFIDENCE:.0%} interval" if i == 1 else None
        panel.fill_between(x, np.exp(low_Q), np.exp(high_Q), color=color, alpha=0.2, linewidth=0, label=label)
        for cost, found in zip(points.costs_P, result.multipliers[i - 1], strict=True):
            if found.value is not None:
                filled = "full" if found.read == "measured range" else "none"
                panel.plot(np.exp(cost), found.value, "o", color=color, markersize=5, fillstyle=filled)
        if result.fit is not None:
            costs = np.geomspace(x.min(), BEYOND * x.max(), GRID)
            fits = [result.fit.multiplier(i, float(cost)) for cost in costs]
            label = "by the fits" if i == 1 else None
            panel.plot(
                costs,
                [np.nan if fit is None else fit[0] for fit in fits],
                color=color,
                linewidth=1,
                linestyle=DASHED,
                label=label,
            )
    _style_costs(panel, result.axis)


def _losses_between(points: Points) -> Array:
    """Log losses from a side's highest to its lowest."""
    return np.linspace(points.losses_P[0], points.losses_P.min(), GRID)


def band(reference: Points, points: Points, costs_Q: Array, logs_Q: Array) -> tuple[Array, Array]:
    """The 95% interval of the log multiplier at each cost.

    At the side's sizes it is that of the tables; between them, the deviations of each resample are interpolated linearly.
    """
    logs_P = log_multipliers(reference, points.losses_P, points.costs_P)
    logs_RP = resampled_log_multipliers(reference, points.losses_RP, points.costs_RP)
    with np.errstate(invalid="ignore"):  # infinite where the reference is extrapolated too far
        deviations_RQ = np.stack([np.interp(costs_Q, points.costs_P, logs_P - own_P) for own_P in logs_RP])
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    high_Q, low_Q = logs_Q - np.quantile(deviations_RQ, tails, axis=0, method="nearest")
    return _finite(low_Q), _finite(high_Q)


def _finite(values: Array) -> Array:
    """Values with gaps where they are infinite."""
    return np.where(np.isfinite(values), values, np.nan)


def _style_costs(panel: Axes, axis: Axis) -> None:
    title = axis_title(axis)
    panel.set_xscale("log")
    panel.set_title(f"By {title}")
    panel.set_xlabel(f"{title} of a run")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_cost(axis, value)))
    panel.xaxis.set_minor_formatter(NullFormatter())
