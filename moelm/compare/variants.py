"""The sides of a comparison: single runs, or groups of runs that differ only in their seed, averaged, and in their length.

Shapes: S seeds, N evaluations, D evaluation documents.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moelm.compare.axes import Axis
from moelm.config import trajectory_settings
from moelm.errors import MoelmError
from moelm.formats import join_names
from moelm.runs.document_losses import DocumentLosses
from moelm.runs.record import Array, Curve, RunRecord


@dataclass(frozen=True, eq=False)
class Variant:
    """One side of a comparison."""

    name: str
    runs: tuple[RunRecord, ...]
    """One run, or one for each seed."""
    price: float | None = None
    """Dollars per process and hour."""
    shorter: tuple["Variant", ...] = ()
    """Complete runs of the same seeds with smaller `train.steps`, the shortest first; each length is a variant."""

    @property
    def lengths(self) -> tuple["Variant", ...]:
        """All lengths, the shortest first; the last is this variant."""
        return (*self.shorter, self)

    @property
    def all_runs(self) -> tuple[RunRecord, ...]:
        """The runs of all lengths, the longest first."""
        return tuple(run for length in reversed(self.lengths) for run in length.runs)

    @property
    def is_complete(self) -> bool:
        """Whether all runs were evaluated at the end of their schedule."""
        return all(self.val.steps[-1] == run.config.train.steps for run in self.runs)

    @property
    def first(self) -> RunRecord:
        """The first run; the others have the same config but for the seed."""
        return self.runs[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each run."""
        return tuple(run.config.seed for run in self.runs)

    @cached_property
    def val(self) -> Curve:
        """The validation curve: means over the runs, at the evaluations that all of them have."""
        return Curve(*(self.column(name).mean(axis=0) for name in ("steps", "tokens", "flops", "seconds", "loss", "bpb")))

    @cached_property
    def losses(self) -> Array:
        """`(S, N)`: the loss of each run at each evaluation of `val`."""
        return self.column("loss")

    @property
    def final_losses(self) -> Array:
        """`(S,)`: the loss of each run at the last evaluation of `val`."""
        last: Array = self.losses[:, -1]
        return last

    @property
    def final_seconds(self) -> Array:
        """`(S,)`: the training time of each run at the last evaluation of `val`."""
        last: Array = self.column("seconds")[:, -1]
        return last

    @property
    def seed_std(self) -> float | None:
        """Standard deviation of the final losses; None for a single run."""
        return float(self.final_losses.std(ddof=1)) if len(self.runs) > 1 else None

    @property
    def domains(self) -> dict[str, dict[str, float]]:
        """Mean `loss` and `bpb` of each domain at the last evaluation of `val`."""
        by_run = [run.domains_at.get(int(self.val.steps[-1]), {}) for run in self.runs]
        return {
            name: {key: float(np.mean([domains[name][key] for domains in by_run])) for key in ("loss", "bpb")}
            for name in by_run[0]
            if all(name in domains for domains in by_run)
        }

    @property
    def document_losses(self) -> tuple[DocumentLosses, Array] | None:
        """The evaluation documents, and the loss of each run on each `(S, D)`, in nats.

        None unless all runs have saved them at the last evaluation of `val`.
        """
        saved = [run.documents for run in self.runs]
        if any(each is None or each[1] != self.val.steps[-1] for each in saved):
            return None
        documents = [each[0] for each in saved if each is not None]
        return documents[0], np.stack([each.nats for each in documents])

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the runs."""
        rates = [run.tokens_per_second for run in self.runs if run.tokens_per_second is not None]
        return float(np.mean(rates)) if rates else None

    @property
    def memory_peak(self) -> int | None:
        """Maximum over the runs, in bytes."""
        return max((run.memory_peak for run in self.runs if run.memory_peak is not None), default=None)

    def cost(self, axis: Axis) -> Array:
        """`(N,)`: the cumulative cost at each evaluation of `val`."""
        if axis == "dollars":
            processes = np.array([[int(run.environment.get("processes", 1))] for run in self.runs])
            dollars: Array = (self.column("seconds") / 3600 * processes).mean(axis=0) * (self.price or 0.0)
            return dollars
        cost: Array = getattr(self.val, axis)
        return cost

    def column(self, name: str) -> Array:
        """`(S, N)`: one column of each run's validation curve, at the evaluations that all runs have.

        Raises:
            MoelmError: there is no such evaluation.
        """
        curves = [run.val for run in self.runs]
        common = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
        if not common:
            raise MoelmError(f"The runs of {self.name} were never evaluated at the same step.")
        return np.stack([getattr(curve, name)[np.searchsorted(curve.steps, common)] for curve in curves])


def group_runs(runs: Sequence[RunRecord], grouped: bool = False, prices: Sequence[float] = ()) -> tuple[Variant, ...]:
    """Runs as variants, in their order.

    Args:
        grouped: whether runs that differ only in their seed and in `train.steps` are one variant.
        prices: dollars per process and hour: one for all variants, or one for each.

    Raises:
        MoelmError: two runs of a group have the same seed and length, lengths have different seeds or are not complete, or
            the prices are invalid.
    """
    groups = runs_by_config(runs) if grouped else [[run] for run in runs]
    if len(prices) not in (0, 1, len(groups)):
        raise MoelmError(
            f"There are {len(prices)} prices for {len(groups)} variants; one for all, or one for each is expected."
        )
    for price in prices:
        if not 0 < price < math.inf:
            raise MoelmError(f"The price {price} is invalid; dollars per hour above 0 are expected.")
    per_variant: Sequence[float | None] = prices or [None]
    if len(per_variant) == 1:
        per_variant = [per_variant[0]] * len(groups)
    longest = [_by_length(group)[-1] for group in groups]
    names = [_group_name(group) for group in longest]
    if len(set(names)) < len(names):
        names = [group[0].name for group in longest]
    return tuple(make_variant(*each) for each in zip(names, groups, per_variant, strict=True))


def make_variant(name: str, runs: Sequence[RunRecord], price: float | None = None) -> Variant:
    """A variant with its runs in the order of their seeds, those with the largest `train.steps` as the longest.

    Raises:
        MoelmError: see `group_runs`.
    """
    *shorter, longest = (sorted(group, key=lambda run: run.config.seed) for group in _by_length(runs))
    for group in (*shorter, longest):
        if len({run.config.seed for run in group}) < len(group):
            same = join_names([run.name for run in group])
            raise MoelmError(f"{same} have the same config, but not all have different seeds.")
    lengths = tuple(Variant(f"{name} ({group[0].config.train.steps:,} steps)", tuple(group), price) for group in shorter)
    variant = Variant(name, tuple(longest), price, lengths)
    if shorter:
        _check_lengths(variant)
    return variant


def _by_length(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """The runs by `train.steps`, the smallest first."""
    steps = sorted({run.config.train.steps for run in runs})
    return [[run for run in runs if run.config.train.steps == each] for each in steps]


def _check_lengths(variant: Variant) -> None:
    """Refuse lengths of different seeds, or that are not trained to their ends."""
    for length in variant.lengths:
        steps = length.first.config.train.steps
        if length.seeds != variant.seeds:
            ours, theirs = (", ".join(map(str, each.seeds)) for each in (length, variant))
            raise MoelmError(
                f"{variant.name} has runs of {steps:,} steps with the seeds {ours}, and runs of "
                f"{variant.first.config.train.steps:,} steps with the seeds {theirs}; all lengths need the same seeds."
            )
        for run in length.runs:
            if run.val.steps[-1] != steps:
                raise MoelmError(
                    f"{run.name} was last evaluated at step {run.val.steps[-1]:,.0f} of {steps:,}; runs that differ in "
                    "train.steps are read at their ends, so all of them must be complete."
                )


def runs_by_config(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups of runs with the same training settings but for the seed and `train.steps`, in their order."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        settings = trajectory_settings(run.config)
        shared = {key: value for key, value in settings.items() if key not in ("seed", "train.steps")}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    return list(groups.values())


def _group_name(group: Sequence[RunRecord]) -> str:
    """The common rest of the run names without their seeds, or else the first name."""
    if len(group) == 1:
        return group[0].name
    stems = {re.sub(rf"[-_. ]*(seed[-_. ]*|(?<=[-_. ])s)?0*{run.config.seed}$", "", run.name) for run in group}
    return stems.pop() or group[0].name if len(stems) == 1 else group[0].name
