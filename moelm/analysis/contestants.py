"""Who is compared: runs, or groups of runs that differ in nothing but their seed, as if each were one run.

Shapes: S seeds, D evaluation documents.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any, Literal

import numpy as np

from moelm.analysis.runs import Array, Curve, Load, RunRecord
from moelm.analysis.words import listed
from moelm.config import RunConfig
from moelm.document_losses import DocumentLosses
from moelm.errors import MoelmError

Axis = Literal["tokens", "flops", "seconds", "dollars"]

AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds", "dollars")
AXIS_NAMES: Mapping[Axis, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "wall-clock", "dollars": "dollars"}

APART = ("name", "seed", "wandb", "parallel")
"""Sections of a config in which the runs of one group may differ: nothing else that is learned depends on them."""


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
        return Curve(*(self._column(name).mean(axis=0) for name in ("steps", "tokens", "flops", "seconds", "loss", "bpb")))

    @cached_property
    def losses(self) -> Array:
        """`(S, N)`: each run's losses at the evaluations of `val`."""
        return self._column("loss")

    def _column(self, name: str) -> Array:
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
        """`loss` and `bpb` of each domain at the last evaluation, means over the runs."""
        each = [run.domains for run in self.runs]
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

    def cost(self, axis: Axis) -> Array:
        """What each evaluation had cost by then, on one axis."""
        if axis == "dollars":
            hours = self.val.seconds / 3600
            return hours * (self.price or 0.0) * int(self.environment.get("processes", 1))
        cost: Array = getattr(self.val, axis)
        return cost


def gather(
    runs: Sequence[RunRecord], grouped: bool, prices: Sequence[float] = (), names: Sequence[str] = ()
) -> tuple[Contestant, ...]:
    """Runs as contestants, in their order.

    Args:
        grouped: whether runs that differ in nothing but their seed are one contestant.
        prices: dollars an hour of one process: one for all contestants, or one for each.
        names: of the contestants; default: what the names of their runs have in common.

    Raises:
        MoelmError: a seed twice in a group, or a wrong number of prices.
    """
    groups = groups_of(runs) if grouped else [[run] for run in runs]
    for group in groups:
        if len({run.config.seed for run in group}) < len(group):
            raise MoelmError(f"{listed([run.name for run in group])} have equal configs, but not each a seed of its own.")
    if len(prices) not in (0, 1, len(groups)):
        raise MoelmError(f"There are {len(prices)} prices for {len(groups)} contestants; one for all, or one for each.")
    if any(price <= 0 for price in prices):
        raise MoelmError(f"A price is {min(prices)}; dollars an hour above 0 are expected.")
    each: Sequence[float | None] = list(prices) * (len(groups) if len(prices) == 1 else 1) or [None] * len(groups)
    known = list(names) or [_name(group) for group in groups]
    if len(set(known)) < len(known):
        known = [group[0].name for group in groups]
    return tuple(Contestant(name, tuple(group), price) for name, group, price in zip(known, groups, each, strict=True))


def groups_of(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs whose configs are equal but for the seed, in their order."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(_shared(run.config))), []).append(run)
    return list(groups.values())


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nest of mappings and lists, by their dotted names."""
    if not isinstance(node, dict | list):
        yield prefix, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _shared(config: RunConfig) -> list[tuple[str, str]]:
    flat = flatten(config.model_dump(mode="json"))
    return [(key, repr(value)) for key, value in flat if key.partition(".")[0] not in APART]


def _name(group: Sequence[RunRecord]) -> str:
    """What the names of a group have in common, without the word that leads to the number of the seed."""
    if len(group) == 1:
        return group[0].name
    common = re.sub(r"[-_. ]*(seed|s)?[-_. ]*$", "", commonprefix([run.name for run in group]))  # noqa: RUF071, letters are meant
    return common or group[0].name


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
