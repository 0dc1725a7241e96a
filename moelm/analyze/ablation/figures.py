"""Figures of ablations: effects by expert and domain, other routes, and fewer experts."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moelm.analyze.ablation.routes import REPLACEMENTS
from moelm.report.figures import COLORS, DASHED, MUTED, legend_label

SIZE = (10.5, 3.8)
"""Of a figure with two panels, in inches."""


def draw_effects(report: dict[str, Any]) -> Figure:
    """What each expert sees, and how much a domain's loss rises without it, in the first, the middle and the last layer."""
    layers = report["ablation"]["layers"]
    shown = [layers[i] for i in dict.fromkeys((0, len(layers) // 2, len(layers) - 1))]
    domains = list(layers[0]["routes"]["shares"])
    figure = Figure(figsize=(10.5, (0.6 + 0.24 * len(domains)) * len(shown) + 0.9), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False, sharex=True, sharey=True)
    for row, layer in zip(panels, shown, strict=True):
        number, cells = layer["layer"], layer["experts"]["mask"]["domains"]
        shares = np.array([layer["routes"]["shares"][domain] for domain in domains])
        excess = np.array([np.subtract(cells[domain]["loss"], cells[domain]["control"]) for domain in domains])
        _draw_cells(figure, row[0], shares, domains, f"Layer {number}: share of the domain's assignments")
        _draw_cells(figure, row[1], excess, domains, f"Layer {number}: loss without the expert, minus control", signed=True)
        found = np.array([cells[domain]["effect"] for domain in domains])
        row[1].plot(*np.nonzero(found)[::-1], "o", color="black", markersize=3)
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    return figure


def draw_routes(report: dict[str, Any]) -> Figure:
    """The loss with other routes by layer, and how often a token's route is better than a random one."""
    layers = report["ablation"]["layers"]
    numbers = np.arange(len(layers))
    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    width = 0.82 / len(layers[0]["routes"]["replaced"])
    for i, name in enumerate(layers[0]["routes"]["replaced"]):
        values = [layer["routes"]["replaced"][name] for layer in layers]
        centers = numbers - 0.41 + (i + 0.5) * width
        left.bar(
            centers, [v["mean"] for v in values], width, color=COLORS[i + 1], label=REPLACEMENTS[name],
            yerr=_half_widths(values), error_kw={"elinewidth": 1, "ecolor": MUTED},
        )  # fmt: skip
    left.set_title("Loss with other routes in one layer")
    left.set_ylabel("nats per token, minus the model's loss")
    left.legend(fontsize=9)
    better = [layer["routes"]["better_than_random"] for layer in layers]
    right.errorbar(numbers, [v["mean"] for v in better], _half_widths(better), marker="o", color=COLORS[1])
    right.axhline(0.5, color=MUTED, linestyle=DASHED)
    right.set_title("Random routes with a higher loss")
    right.set_ylabel("share")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.set_xticks(numbers, [str(layer["layer"]) for layer in layers])
    return figure


def draw_capacity(report: dict[str, Any]) -> Figure:
    """The loss by the number of experts per token, and by the number of experts left in each layer."""
    ablation = report["ablation"]
    figure = Figure(figsize=SIZE, layout="constrained")
    *left, right = figure.subplots(1, 2 if ablation["top_k"] else 1, squeeze=False)[0]
    for axes in left:
        _draw_curve(axes, ablation["top_k"], "top_k", COLORS[1], None)
        axes.set_title("Experts per token")
        axes.set_xticks([point["top_k"] for point in ablation["top_k"]])
    labels = {"load": "lowest load first", "ablation": "lowest effect first", "random": "random order"}
    colors = {"load": COLORS[2], "ablation": COLORS[1], "random": MUTED}
    for order, curve in ablation["removal"].items():
        _draw_curve(right, curve, "experts", colors[order], labels[order])
    right.set_title("Experts left in each layer")
    right.legend()
    figure.axes[0].set_ylabel("nats per token, minus the model's loss")
    for axes in (*left, right):
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=DASHED)
    return figure


def _draw_curve(axes: Axes, curve: list[dict[str, Any]], key: str, color: str, label: str | None) -> None:
    means = [point["mean"] for point in curve]
    axes.errorbar([point[key] for point in curve], means, _half_widths(curve), marker="o", color=color, label=label)
    axes.set_xlabel("experts")


def _half_widths(values: list[dict[str, Any]]) -> list[float]:
    return [0.0 if value["high"] is None else value["high"] - value["mean"] for value in values]


def _draw_cells(figure: Figure, axes: Axes, values: Any, domains: list[str], title: str, signed: bool = False) -> None:
    limit = float(np.abs(values).max()) or 1.0
    color_map, low = ("RdBu_r", -limit) if signed else ("viridis", 0.0)
    image = axes.imshow(values, color_map, aspect="auto", interpolation="nearest", vmin=low, vmax=limit)
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(domains)), [legend_label(domain) for domain in domains])
    axes.grid(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.outline.set_visible(False)
