"""What one more doubling brings where contestants differ in their experts: their number, granularity, or how many serve."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelm.analysis.contestants import Contestant
from moelm.config import MoEFFNConfig


@dataclass(frozen=True)
class Trend:
    """Final loss by the base-2 logarithm of one setting: a straight line through all runs."""

    what: str
    """`experts`, `granularity` or `top_k`."""
    noun: str
    """Of what one more doubling is meant."""
    values: tuple[float, ...]
    """By contestant."""
    names: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    """Final losses of each contestant's runs."""
    slope: float
    """Nats per token for each doubling; below 0 it helps."""
    at_one: float
    """The line at a value of 1."""
    error: float | None
    """Standard error of the slope; None with fewer than three runs."""

    @property
    def sentence(self) -> str:
        """The slope in words."""
        sure = f" (standard error {self.error:.3f})" if self.error is not None else ""
        word = "lowers" if self.slope < 0 else "raises"
        return f"Each doubling of {self.noun} {word} the final loss by {abs(self.slope):.3f} nats{sure}."


def find_trend(contestants: Sequence[Contestant]) -> Trend | None:
    """The one setting of the experts that contestants were made to differ in; None without one.

    Granularity (Krajewski et al. 2024) where all experts together keep their hidden units and are cut finer; else the
    number of experts (Shazeer et al. 2017, figures 2 and 3), a dense model having one; else how many a token visits.
    """
    shapes = [_shape(contestant) for contestant in contestants]
    sparse = [i for i, shape in enumerate(shapes) if shape.experts > 1]
    units = [shapes[i].experts * shapes[i].width for i in sparse]
    cut = len({shapes[i].width for i in sparse}) > 1 and max(units) <= 1.1 * min(units)
    if len(sparse) > 1 and cut:
        widest = max(shapes[i].width for i in sparse)
        values = {i: widest / shapes[i].width for i in sparse}
        return _fit("granularity", "the experts' granularity", values, contestants)
    numbers = {i: float(shape.experts) for i, shape in enumerate(shapes)}
    if len({shapes[i].experts for i in sparse}) > 1:
        return _fit("experts", "the number of experts", numbers, contestants)
    visited = {i: float(shapes[i].top_k) for i in sparse}
    if len(set(visited.values())) > 1:
        return _fit("top_k", "the experts that a token visits", visited, contestants)
    return None


@dataclass(frozen=True)
class _Shape:
    experts: int
    width: int
    top_k: int


def _shape(contestant: Contestant) -> _Shape:
    ffn = contestant.config.model.ffn
    if isinstance(ffn, MoEFFNConfig):
        return _Shape(ffn.num_experts, ffn.hidden_dim, ffn.top_k)
    return _Shape(1, ffn.hidden_dim, 1)


def _fit(what: str, noun: str, values: dict[int, float], contestants: Sequence[Contestant]) -> Trend:
    losses = {i: tuple(contestants[i].final_losses.tolist()) for i in values}
    x = np.array([np.log2(values[i]) for i in values for _ in losses[i]])
    y = np.array([loss for i in values for loss in losses[i]])
    slope, at_one = np.polyfit(x, y, 1)
    left = y - (slope * x + at_one)
    free = len(y) - 2
    error = float(np.sqrt((left**2).sum() / free / ((x - x.mean()) ** 2).sum())) if free > 0 else None
    names = tuple(contestants[i].name for i in values)
    return Trend(what, noun, tuple(values.values()), names, tuple(losses.values()), float(slope), float(at_one), error)
