"""The matplotlib style of all figures in reports, for light and for dark pages.

Figures are drawn without pyplot: no global state, no display.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

COLORS = ("#7b8794", "#d1495b", "#3a86b7", "#e09f3e", "#5a9f4e", "#8f6cc0", "#3aa6a0", "#b5652f")
"""Line colors. The first, grey, is for the reference of a comparison."""
MUTED = "#7b8794"
"""Axes, ticks and guide lines."""
DASHED = (0, (4, 3))
"""Line style of guide lines."""
DPI = 160


class Theme(NamedTuple):
    """Colors of a figure that depend on the page's background."""

    background: str
    text: str
    grid: str


LIGHT, DARK = Theme("#ffffff", "#1f2933", "#e4e7eb"), Theme("#15191e", "#e4e7eb", "#2b343d")


def legend_label(name: str) -> str:
    """A name as a label of a legend, from which matplotlib leaves out what starts with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def render_light_and_dark(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """Draw a figure twice, in the light and in the dark theme.

    Returns:
        Both as PNG.
    """
    light, figure = _render(draw, LIGHT)
    dark, _ = _render(draw, DARK, placed_as=figure)
    return light, dark


def _render(draw: Callable[[], Figure], theme: Theme, placed_as: Figure | None = None) -> tuple[bytes, Figure]:
    """The figure as PNG; its axes are placed as those of another figure, which is faster than computing their places."""
    with mpl.rc_context(_style(theme)):
        figure = draw()
        if placed_as is not None:
            figure.set_layout_engine("none")
            for axes, other in zip(figure.axes, placed_as.axes, strict=True):
                axes.set_position(other.get_position(original=True), which="original")
        file = io.BytesIO()
        figure.savefig(file, dpi=DPI, format="png")
        return file.getvalue(), figure


def _style(theme: Theme) -> Any:
    return {
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "legend.frameon": False,
        "text.color": theme.text,
        "text.parse_math": False,
    }
