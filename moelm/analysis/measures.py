"""What two contestants say about each other: who needs how much to reach whose loss, and who leads at equal cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moelm.analysis.contestants import Axis, Contestant
from moelm.analysis.intervals import Interval, Paired, student
from moelm.analysis.runs import Array

TIE = 0.005
"""Nats per token under which two losses count as equal, however sure the difference is."""
CLOCKED: tuple[Axis, ...] = ("seconds", "dollars")
"""Costs that are measured anew in every run."""


@dataclass(frozen=True)
class Need:
    """What one contestant spends until it is as good as another at its end."""

    need: float | None
    """Tokens, FLOPs, seconds or dollars; None when it is not reached."""
    total: float
    """What the other spent to get there."""

    @property
    def ratio(self) -> float | None:
        """Above 1, the contestant is that many times as thrifty as the other."""
        return self.total / self.need if self.need else None


@dataclass(frozen=True)
class Equal:
    """The losses of two contestants where both have spent the same."""

    at: float
    """Tokens, FLOPs, seconds or dollars: the most that both have spent."""
    loss_a: float
    loss_b: float
    margin: float = TIE
    """Nats up to which a difference may be chance."""

    @property
    def gain(self) -> float:
        """Nats by which the first is better."""
        return self.loss_b - self.loss_a

    @property
    def level(self) -> bool:
        """Whether the difference is too small to matter."""
        return abs(self.gain) < TIE - 1e-9

    @property
    def tie(self) -> bool:
        """Whether the difference is too small, or too unsure, to name a winner."""
        return abs(self.gain) < self.margin - 1e-9  # a difference of two decimal losses is off by a few ulps


@dataclass(frozen=True)
class Pair:
    """Contestant `a` measured against contestant `b`."""

    a: str
    b: str
    target: float
    """Final validation loss of `b`, in nats per token."""
    needs: Mapping[Axis, Need]
    equal: Mapping[Axis, Equal | None]
    """None where the two were never evaluated at a common cost."""
    paired: Paired | None
    """None where not both tell their losses on each document."""


def measure(a: Contestant, b: Contestant, axes: tuple[Axis, ...], both: Paired | None) -> Pair:
    """All that is asked of two contestants.

    Args:
        both: their difference on the same documents, where it is known.
    """
    target = float(b.val.loss[-1])
    known = None if both is None else both.whole
    return Pair(
        a=a.name,
        b=b.name,
        target=target,
        needs={axis: Need(first_reach(a.cost(axis), a.val.loss, target), float(b.cost(axis)[-1])) for axis in axes},
        equal={axis: losses_at_equal(a, b, axis, known) for axis in axes},
        paired=both,
    )


def first_reach(x: Array, loss: Array, target: float) -> float | None:
    """Where a curve's running best comes down to `target`, linear between evaluations; None if never."""
    best = np.minimum.accumulate(loss)
    below = np.flatnonzero(best <= target)
    if not below.size:
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    part = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(x[i - 1] + part * (x[i] - x[i - 1]))


def losses_at_equal(a: Contestant, b: Contestant, axis: Axis, known: Interval | None = None) -> Equal | None:
    """Both losses at the largest cost that both reached, linear between evaluations; None without overlap.

    Args:
        known: how sure the difference at the end is; a smaller one elsewhere counts as no surer.
    """
    xa, xb = a.cost(axis), b.cost(axis)
    at = min(xa[-1], xb[-1])
    if at < max(xa[0], xb[0]):
        return None
    loss_a, loss_b = float(np.interp(at, xa, a.val.loss)), float(np.interp(at, xb, b.val.loss))
    doubt = 0.0 if known is None else known.doubt(loss_b - loss_a)
    return Equal(float(at), loss_a, loss_b, max(TIE, doubt, _doubt_of_clocks(a, b) if axis in CLOCKED else 0.0))


def _doubt_of_clocks(a: Contestant, b: Contestant) -> float:
    """Half of the 95% interval of the gain at equal time, by how it scatters over pairs of runs of one seed; 0 where there
    are no such pairs."""
    if a.seeds != b.seeds or len(a.seeds) < 2:
        return 0.0
    gains = []
    for sa, sb, la, lb in zip(a.column("seconds"), b.column("seconds"), a.losses, b.losses, strict=True):
        at = min(sa[-1], sb[-1])
        gains.append(float(np.interp(at, sb, lb) - np.interp(at, sa, la)))
    return student(len(gains) - 1) * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
