"""The pictures of routing: who works on which domain, how often an expert repeats, and which experts go together."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moelm.analysis.plots import COLOURS, QUIET

_DASH = (0, (4, 3))


def draw_shares(told: dict[str, Any]) -> Figure:
    """Share of each domain's assignments by expert, in the first, middle and last sparse layer (Mixtral, figure 7)."""
    shown = _three(told["layers"])
    domains = list(told["domains"])
    figure = Figure(figsize=(10.5, 2.5 * len(shown) + 0.6), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.82 / len(domains)
    places = np.arange(told["num_experts"])
    for axes, layer in zip(panels, shown, strict=True):
        for i, domain in enumerate(domains):
            left = places - 0.41 + (i + 0.5) * width
            label = domain if axes is panels[0] else None
            axes.bar(left, layer["shares"][domain], width, color=COLOURS[i % len(COLOURS)], label=label)
        axes.axhline(1 / told["num_experts"], color=QUIET, linewidth=1, linestyle=_DASH)
        axes.set_title(f"Layer {layer['layer']}{_effect(layer)}")
        axes.set_ylabel("share of assignments")
        axes.grid(axis="x", visible=False)
    panels[-1].set_xlabel("expert")
    if told["num_experts"] <= 32:
        panels[-1].set_xticks(places)
    figure.legend(loc="outside upper left", ncols=min(4, len(domains)), handlelength=1.2)
    return figure


def _effect(layer: dict[str, Any]) -> str:
    found = layer["association"].get("all")
    return f": Cramér's V {found['cramers_v']:.2f}, p {found['p']:.3g}" if found else ""


def draw_repetition(told: dict[str, Any]) -> Figure:
    """Neighbours that share their first expert, and any expert, by layer, beside chance (Mixtral, table 5)."""
    layers = told["layers"]
    numbers = [layer["layer"] for layer in layers]
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2), ("first", "any"), ("The same first expert", "An expert in common"), strict=True
    ):
        lines = (
            ("all", "neighbours", COLOURS[1], "-"),
            ("shuffled", "tokens of a domain, shuffled", COLOURS[2], "-"),
            ("matched", "by load alone", COLOURS[3], _DASH),
            ("uniform", "by lot", QUIET, _DASH),
        )
        for key, label, colour, style in lines:
            values = [layer["repetition"][kind][key] for layer in layers]
            if None not in values:
                axes.plot(numbers, values, linestyle=style, marker="o", markersize=4, color=colour, label=label)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_xticks(numbers if len(numbers) <= 16 else numbers[:: len(numbers) // 8])
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("share of neighbours")
    figure.axes[0].legend()
    return figure


def draw_experts(told: dict[str, Any]) -> Figure:
    """Which experts serve the same tokens, and how alike they are as weights, in three layers."""
    shown = _three(told["layers"])
    figure = Figure(figsize=(3.6 * len(shown), 6.8), layout="constrained")
    rows = figure.subplots(2, len(shown), squeeze=False)
    for axes, layer in zip(rows[0], shown, strict=True):
        _matrix(figure, axes, layer["together"], f"Layer {layer['layer']}: of the row's\ntokens, seen by the column too")
    for axes, layer in zip(rows[1], shown, strict=True):
        matrix = np.array(layer["similarity"]["matrix"])
        np.fill_diagonal(matrix, np.nan)
        _matrix(figure, axes, matrix, f"Layer {layer['layer']}: cosine\nof the weights")
    return figure


def draw_saturation(told: dict[str, Any]) -> Figure:
    """Share of each layer's choices that other checkpoints made too, by their step (OLMoE 2024, router saturation)."""
    layers = told["layers"]
    colours = mpl.colormaps["viridis"](np.linspace(0.25, 0.85, len(layers)))
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2), ("first", "experts"), ("The same first expert", "The same experts"), strict=True
    ):
        for layer, colour in zip(layers, colours, strict=True):
            found = {same["step"]: same[kind] for same in layer["saturation"]["checkpoints"]} | {told["step"]: 1.0}
            steps = sorted(found)
            shares = [found[step] for step in steps]
            axes.plot(steps, shares, marker="o", markersize=4, color=colour, label=f"layer {layer['layer']}")
        axes.axhline(layers[0]["saturation"]["uniform"][kind], color=QUIET, linestyle=_DASH, label="by lot")
        axes.set_title(f"{title} as at step {told['step']:,}")
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.03)
    figure.axes[0].set_ylabel("share of choices")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", ncols=-(-len(layers) // 16))
    return figure


def _matrix(figure: Figure, axes: Axes, values: Any, title: str) -> None:
    image = axes.imshow(values, cmap="viridis", interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.grid(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)


def _three(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """First, middle and last, each once."""
    places = dict.fromkeys((0, len(layers) // 2, len(layers) - 1))
    return [layers[place] for place in places]
