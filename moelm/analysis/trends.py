"""What one more doubling brings where contestants differ in their experts: their number, granularity, or how many serve."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelm.analysis.contestants import Contestant
from moelm.analysis.intervals import student
from moelm.analysis.words import counted
from moelm.config import MoEFFNConfig, identity

OWN = ("model.ffn.num_experts", "model.ffn.top_k", "model.ffn.hidden_dim", "model.ffn.router.normalize", "seed")
"""What mixtures in one trend may differ in: top-1 gates are not renormalised, for they would teach a router nothing."""
ALIKE = 0.1
"""Relative difference under which widths, or all hidden units together, count as kept."""


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
    doubt: float | None
    """Half of the slope's 95% interval; None with too few runs to tell."""

    @property
    def sentence(self) -> str:
        """The slope in words."""
        runs = counted(sum(map(len, self.losses)), "run")
        sure = (
            f" (95%: {self.slope - self.doubt:+.3f} to {self.slope + self.doubt:+.3f}" if self.doubt is not None else " ("
        )
        sure += f", {runs})" if self.doubt is not None else f"{runs}, too few to say how surely)"
        return f"Each doubling of {self.noun} changes the final loss by {self.slope:+.3f} nats{sure}."


def find_trend(contestants: Sequence[Contestant]) -> Trend | None:
    """The one setting of the experts that contestants were made to differ in; None where they differ in others too.

    Granularity (Krajewski et al. 2024) where all experts together keep their hidden units and are cut finer; else the
    number of experts of one width (Shazeer et al. 2017, figures 2 and 3), a dense model having one; else how many a token
    visits.
    """
    sparse = {i: each.config.model.ffn for i, each in enumerate(contestants)}
    experts = {i: ffn for i, ffn in sparse.items() if isinstance(ffn, MoEFFNConfig) and ffn.num_experts > 1}
    if len(experts) < 2 or not _comparable(contestants, list(experts)):
        return None
    numbers, widths = ([getattr(ffn, key) for ffn in experts.values()] for key in ("num_experts", "hidden_dim"))
    visits = {i: float(ffn.top_k) for i, ffn in experts.items()}
    if _kept([number * width for number, width in zip(numbers, widths, strict=True)]) and not _kept(numbers):
        finer = {i: max(widths) / ffn.hidden_dim for i, ffn in experts.items()}
        return _fit("granularity", "the experts' granularity", finer, contestants)
    if _kept(widths) and not _kept(numbers) and len(set(visits.values())) == 1:
        counts = {i: float(experts[i].num_experts if i in experts else 1) for i in range(len(contestants))}
        return _fit("experts", "the number of experts", counts, contestants)
    if len(set(numbers)) == 1 and len(set(visits.values())) > 1:
        noun = "the experts that a token visits" + ("" if _kept(widths) else ", each as much narrower,")
        return _fit("top_k", noun, visits, contestants)
    return None


def _comparable(contestants: Sequence[Contestant], sparse: Sequence[int]) -> bool:
    """Whether mixtures differ in nothing but `OWN`, and the others in nothing outside the feed-forward blocks."""
    kept = [identity(each.config) for each in contestants]
    mixtures = [{key: value for key, value in kept[i].items() if key not in OWN} for i in sparse]
    rest = [
        {key: value for key, value in each.items() if not key.startswith("model.ffn.") and key != "seed"} for each in kept
    ]
    return all(each == mixtures[0] for each in mixtures) and all(each == rest[0] for each in rest)


def _kept(sizes: Sequence[int]) -> bool:
    return max(sizes) <= (1 + ALIKE) * min(sizes)


def _fit(what: str, noun: str, values: dict[int, float], contestants: Sequence[Contestant]) -> Trend:
    chosen = [contestants[i] for i in values]
    losses = [each.final_losses for each in chosen]
    x = np.array([np.log2(value) for value, each in zip(values.values(), losses, strict=True) for _ in each])
    y = np.concatenate(losses)
    free = len(y) - 2
    if len({each.seeds for each in chosen}) == 1:  # what a seed does to all alike is no doubt about the slope
        table = np.stack(losses)
        y = (table - table.mean(axis=0) + table.mean()).ravel()
        free -= table.shape[1] - 1
    slope, at_one = np.polyfit(x, y, 1)
    left = y - (slope * x + at_one)
    error = float(np.sqrt((left**2).sum() / free / ((x - x.mean()) ** 2).sum())) if free > 0 else None
    return Trend(
        what=what,
        noun=noun,
        values=tuple(values.values()),
        names=tuple(each.name for each in chosen),
        losses=tuple(tuple(each.tolist()) for each in losses),
        slope=float(slope),
        at_one=float(at_one),
        doubt=None if error is None else student(free) * error,
    )
