"""Who is compared: runs, or groups of runs that differ in nothing but their seed, as if each were one run.

Shapes: S seeds, D evaluation documents.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from moelm.analysis.runs import Array, Curve, Load, RunRecord
from moelm.analysis.words import listed
from moelm.config import RunConfig, identity
from moelm.document_losses import DocumentLosses
from moelm.errors import MoelmError

Axis = Literal["tokens", "flops", "seconds", "dollars"]

AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds", "dollars")
AXIS_NAMES: Mapping[Axis, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "wall-clock", "dollars": "dollars"}


@dataclass(frozen=True, eq=False)
class Contestant:
    """One side of a comparison."""

    name: str
    runs: tuple[RunRecord, ...]
    """One, or one for each seed."""
    price: float | None = None
    """Dollars an hour of one process."""

    @property
    def config(self) -> RunConfig:
        """That of the first run; the others' is the same but for the seed."""
        return self.runs[0].config

    @property
    def environment(self) -> dict[str, Any]:
        """That of the first run."""
        return self.runs[0].environment

    @property
    def parameters(self) -> dict[str, int]:
        """`total`, `active` and perhaps `embedding` parameters."""
        return self.runs[0].parameters

    @property
    def flops_per_token(self) -> int:
        """Forward and backward together."""
        return self.runs[0].flops_per_token

    @property
    def load(self) -> Load | None:
        """That of the first run."""
        return self.runs[0].load

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its runs."""
        return tuple(run.config.seed for run in self.runs)

    @cached_property
    def val(self) -> Curve:
        """Means over the runs, at the evaluations that all of them have."""
        return Curve(*(self.column(name).mean(axis=0) for name in ("steps", "tokens", "flops", "seconds", "loss", "bpb")))

    @cached_property
    def losses(self) -> Array:
        """`(S, N)`: each run's losses at the evaluations of `val`."""
        return self.column("loss")

    def column(self, name: str) -> Array:
        """`(S, N)`: one column of each run's curve, at the evaluations of `val`."""
        curves = [run.val for run in self.runs]
        common = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
        if not common:
            raise MoelmError(f"The runs of {self.name} were never evaluated at the same step.")
        return np.stack([getattr(curve, name)[np.searchsorted(curve.steps, common)] for curve in curves])

    @property
    def final_losses(self) -> Array:
        """`(S,)`: each run's loss at the last evaluation that all of them have."""
        last: Array = self.losses[:, -1]
        return last

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final losses over seeds; None for a single run."""
        return float(self.final_losses.std(ddof=1)) if len(self.runs) > 1 else None

    @property
    def domains(self) -> dict[str, dict[str, float]]:
        """`loss` and `bpb` of each domain at the last evaluation that all runs have, means over them."""
        each = [run.domains_at.get(int(self.val.steps[-1]), {}) for run in self.runs]
        return {
            name: {key: float(np.mean([domains[name][key] for domains in each])) for key in ("loss", "bpb")}
            for name in each[0]
            if all(name in domains for domains in each)
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the runs."""
        return _mean([run.tokens_per_second for run in self.runs])

    @property
    def memory_peak(self) -> int | None:
        """Bytes, the most of any run."""
        peaks = [run.memory_peak for run in self.runs if run.memory_peak is not None]
        return max(peaks) if peaks else None

    @property
    def documents(self) -> tuple[DocumentLosses, Array] | None:
        """The evaluation documents, and each run's losses on them `(S, D)`; None where not all runs tell them."""
        last = self.val.steps[-1]
        told = [run.documents for run in self.runs]
        if any(each is None or each[1] != last for each in told):
            return None
        found = [each[0] for each in told if each is not None]
        return found[0], np.stack([each.nats for each in found])

    @property
    def seconds(self) -> Array:
        """`(S,)`: training time of each run at the last evaluation that all of them have."""
        last: Array = self.column("seconds")[:, -1]
        return last

    def told(self, key: str) -> str:
        """What environment.json says of its runs: one value, or several with commas between them."""
        values = [run.environment.get(key) for run in self.runs]
        words = (json.dumps(value) if not isinstance(value, str) else value for value in values if value is not None)
        return ", ".join(dict.fromkeys(words)) or "–"

    def cost(self, axis: Axis) -> Array:
        """What each evaluation had cost by then, on one axis."""
        if axis == "dollars":
            processes = np.array([[int(run.environment.get("processes", 1))] for run in self.runs])
            paid: Array = (self.column("seconds") / 3600 * processes).mean(axis=0) * (self.price or 0.0)
            return paid
        cost: Array = getattr(self.val, axis)
        return cost


def gather(runs: Sequence[RunRecord], grouped: bool = False, prices: Sequence[float] = ()) -> tuple[Contestant, ...]:
    """Runs as contestants, in their order.

    Args:
        grouped: whether runs that differ in nothing but their seed are one contestant.
        prices: dollars an hour of one process: one for all contestants, or one for each.

    Raises:
        MoelmError: a seed twice in a group, or unusable prices.
    """
    groups = groups_of(runs) if grouped else [[run] for run in runs]
    for group in groups:
        if len({run.config.seed for run in group}) < len(group):
            raise MoelmError(f"{listed([run.name for run in group])} have equal configs, but not each a seed of its own.")
    if len(prices) not in (0, 1, len(groups)):
        raise MoelmError(f"There are {len(prices)} prices for {len(groups)} contestants; one for all, or one for each.")
    for price in prices:
        if not 0 < price < math.inf:
            raise MoelmError(f"A price is {price}; dollars an hour above 0 are expected.")
    paid: Sequence[float | None] = list(prices) * (len(groups) if len(prices) == 1 else 1) or [None] * len(groups)
    names = [_name(group) for group in groups]
    if len(set(names)) < len(names):
        names = [group[0].name for group in groups]
    return tuple(contestant(*each) for each in zip(names, groups, paid, strict=True))


def contestant(name: str, runs: Sequence[RunRecord], price: float | None = None) -> Contestant:
    """A contestant, its runs in the order of their seeds."""
    return Contestant(name, tuple(sorted(runs, key=lambda run: run.config.seed)), price)


def groups_of(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs that learn the same but for their seed, in their order."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        shared = {key: value for key, value in identity(run.config).items() if key != "seed"}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    return list(groups.values())


def _name(group: Sequence[RunRecord]) -> str:
    """What is left of each run's name without its seed, if that is the same for all."""
    if len(group) == 1:
        return group[0].name
    stems = {re.sub(rf"[-_. ]*(seed[-_. ]*|(?<=[-_. ])s)?0*{run.config.seed}$", "", run.name) for run in group}
    return stems.pop() or group[0].name if len(stems) == 1 else group[0].name


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
