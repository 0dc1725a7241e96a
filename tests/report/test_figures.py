"""Figures for light and for dark pages."""

import numpy as np
from matplotlib.figure import Figure

from moelm.report.figures import DARK, LIGHT, _render, render_light_and_dark


def draw() -> Figure:
    """What moves axes: a legend outside of them, labels, and a color bar, which has an aspect."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([1, 2], [1e5, 2e5], label="a name")
    left.set_ylabel("loss")
    figure.colorbar(right.imshow(np.eye(2)), ax=right)
    figure.legend(loc="outside upper left")
    return figure


def test_the_dark_figure_is_placed_as_its_own_layout_would() -> None:
    light, dark = render_light_and_dark(draw)
    assert light == _render(draw, LIGHT)[0]
    assert dark == _render(draw, DARK)[0]
    assert light != dark
