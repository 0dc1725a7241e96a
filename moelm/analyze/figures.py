"""Figures of a routing report."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moelm.analyze.ablation.figures import draw_capacity, draw_effects, draw_routes
from moelm.report.figures import COLORS, DASHED, MUTED, legend_label, render_light_and_dark
from moelm.report.page import ReportFigure

SIZE = (10.5, 3.8)
"""Of a figure with two panels, in inches."""


def routing_figures(report: dict[str, Any]) -> list[ReportFigure]:
    """All figures of a report, which has the keys of routing.json."""
    figures: list[tuple[str, str, Callable[[dict[str, Any]], Figure]]] = [
        ("shares.png", "Share of each domain's assignments by expert", _shares),
        ("repetition.png", "Adjacent tokens that share experts, by layer, compared with chance", _repetition),
        ("experts.png", "Coactivation of experts, and similarity of their weights", _experts),
    ]
    if report["layers"][0]["saturation"]["checkpoints"]:
        figures.append(("saturation.png", "Agreement of other checkpoints' routing", _saturation))
    if ablation := report["ablation"]:
        figures.append(("routes.png", "Loss with other routes than the router's, by layer", draw_routes))
        if "effects" in ablation:
            figures.append(("ablation.png", "What experts see, and how much a domain loses without them", draw_effects))
        figures.append(("capacity.png", "Loss with more, fewer and removed experts", draw_capacity))
    return [ReportFigure(name, caption, *render_light_and_dark(partial(draw, report))) for name, caption, draw in figures]


def _shares(report: dict[str, Any]) -> Figure:
    """Share of each domain's assignments by expert, in three layers (Mixtral 2024, figure 7)."""
    layers, domains, num_experts = _three(report["layers"]), list(report["domains"]), report["num_experts"]
    figure = Figure(figsize=(10.5, 2.5 * len(layers) + 0.6), layout="constrained")
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.82 / len(domains)
    experts = np.arange(num_experts)
    for axes, layer in zip(panels, layers, strict=True):
        for i, domain in enumerate(domains):
            centers = experts - 0.41 + (i + 0.5) * width
            label = legend_label(domain) if axes is panels[0] else None
            axes.bar(centers, layer["shares"][domain], width, color=COLORS[i % len(COLORS)], label=label)
        axes.axhline(1 / num_experts, color=MUTED, linewidth=1, linestyle=DASHED)
        association = layer["association"].get("all")
        effect = f": Cramér's V {association['cramers_v']:.2f}, p {association['p']:.3g}" if association else ""
        axes.set_title(f"Layer {layer['layer']}{effect}")
        axes.set_ylabel("share of assignments")
        axes.grid(axis="x", visible=False)
    panels[-1].set_xlabel("expert")
    if num_experts <= 32:
        panels[-1].set_xticks(experts)
    figure.legend(loc="outside upper left", ncols=min(4, len(domains)), handlelength=1.2)
    return figure


def _repetition(report: dict[str, Any]) -> Figure:
    """Share of adjacent tokens with the same experts, by layer, and chance levels (Mixtral 2024, table 5)."""
    layers = report["layers"]
    numbers = [layer["layer"] for layer in layers]
    lines = (
        ("all", "adjacent tokens", COLORS[1], "-"),
        ("shuffled", "random pairs in one domain", COLORS[2], "-"),
        ("matched", "independent tokens, same load", COLORS[3], DASHED),
        ("uniform", "uniformly random experts", MUTED, DASHED),
    )
    figure = Figure(figsize=SIZE, layout="constrained")
    titles = {"first": "Same first expert", "any": "An expert in common"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for key, label, color, style in lines:
            values = [layer["repetition"][kind][key] for layer in layers]
            if None not in values:
                axes.plot(numbers, values, linestyle=style, marker="o", markersize=4, color=color, label=label)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_xticks(numbers if len(numbers) <= 16 else numbers[:: len(numbers) // 8])
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("share of pairs")
    figure.axes[0].legend()
    return figure


def _experts(report: dict[str, Any]) -> Figure:
    """Coactivation and weight similarity of experts, in three layers."""
    layers = _three(report["layers"])
    figure = Figure(figsize=(3.6 * len(layers), 6.8), layout="constrained")
    panels = figure.subplots(2, len(layers), squeeze=False)
    for column, layer in zip(panels.T, layers, strict=True):
        cosines = np.array(layer["weight_similarity"]["matrix"])
        np.fill_diagonal(cosines, np.nan)
        _draw_matrix(
            figure, column[0], layer["coactivation"], f"Layer {layer['layer']}: coactivation\n(share of row's tokens)"
        )
        _draw_matrix(figure, column[1], cosines, f"Layer {layer['layer']}: cosine\nsimilarity of weights")
    return figure


def _saturation(report: dict[str, Any]) -> Figure:
    """Router saturation by step of the checkpoint, one line for each layer (OLMoE 2024)."""
    layers = report["layers"]
    colors = mpl.colormaps["viridis"](np.linspace(0.25, 0.85, len(layers)))
    figure = Figure(figsize=SIZE, layout="constrained")
    titles = {"first": "Same first expert", "experts": "Same experts"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for layer, color in zip(layers, colors, strict=True):
            checkpoints = layer["saturation"]["checkpoints"]
            shares = {checkpoint["step"]: checkpoint[kind] for checkpoint in checkpoints} | {report["step"]: 1.0}
            points = sorted(shares.items())
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=f"layer {layer['layer']}")
        uniform = layers[0]["saturation"]["uniform"][kind]
        axes.axhline(uniform, color=MUTED, linestyle=DASHED, label="uniformly random")
        axes.set_title(f"{title} as at step {report['step']:,}")
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.03)
    figure.axes[0].set_ylabel("share")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", ncols=-(-len(layers) // 16))
    return figure


def _draw_matrix(figure: Figure, axes: Axes, values: Any, title: str) -> None:
    image = axes.imshow(values, cmap="viridis", interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.grid(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)


def _three(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the middle and the last layer, each once."""
    return [layers[i] for i in dict.fromkeys((0, len(layers) // 2, len(layers) - 1))]
