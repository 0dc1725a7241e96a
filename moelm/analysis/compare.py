"""Contestants set against each other: pure computation on what their runs have recorded.

Files and pictures live in `report` and `plots`, the words of the answer in `verdict`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelm.analysis.contestants import AXES, Axis, Contestant
from moelm.analysis.intervals import Evidence
from moelm.analysis.measures import Pair, measure
from moelm.analysis.runs import FINGERPRINTS, RunRecord
from moelm.analysis.trends import Trend, find_trend
from moelm.analysis.verdict import Verdict, basis, judge, notes
from moelm.analysis.words import listed
from moelm.config import flatten
from moelm.errors import MoelmError


@dataclass(frozen=True)
class Comparison:
    """Everything a report tells."""

    contestants: tuple[Contestant, ...]
    """The first is the reference."""
    pairs: tuple[Pair, ...]
    """Every ordered pair."""
    challenger: str
    """Whom the verdict sets against the reference: of the others, the lowest final loss."""
    verdict: Verdict
    trend: Trend | None
    """What a doubling brings, where that is what the contestants differ in."""
    basis: str
    """In what the challenger and the reference are of equal size, and in what not."""
    notes: tuple[str, ...]
    """What a careful reader should know before quoting the verdict."""
    warnings: tuple[str, ...]
    """Why these runs are not comparable; empty unless forced."""
    differences: Mapping[str, Mapping[str, Any]]
    """Dotted config key to each contestant's value, for the keys in which contestants differ."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What is counted as cost; dollars only where prices were given."""
        return tuple(self.pairs[0].needs)

    def pair(self, a: str, b: str) -> Pair:
        """The measurements of contestant `a` against `b`."""
        return next(pair for pair in self.pairs if (pair.a, pair.b) == (a, b))


def compare(contestants: Sequence[Contestant], force: bool = False) -> Comparison:
    """Set contestants against each other; the first is the reference.

    Raises:
        MoelmError: fewer than two, or runs on different data without `force`.
    """
    if len(contestants) < 2:
        raise MoelmError("A comparison needs at least two contestants.")
    warnings = tuple(_mismatches([run for contestant in contestants for run in contestant.runs]))
    if warnings and not force:
        raise MoelmError(f"{' '.join(warnings)} Use --force to compare the runs all the same.")
    reference = contestants[0]
    challenger = min(contestants[1:], key=lambda each: each.val.loss[-1])
    axes = AXES if all(each.price is not None for each in contestants) else AXES[:-1]
    evidence = Evidence(contestants)
    pairs: list[Pair] = []
    for a, b in itertools.combinations(contestants, 2):
        both = evidence.paired(a, b)
        pairs += (measure(a, b, axes, both), measure(b, a, axes, both and both.mirrored))
    return Comparison(
        contestants=tuple(contestants),
        pairs=tuple(pairs),
        challenger=challenger.name,
        verdict=judge(challenger, reference, pairs),
        trend=find_trend(contestants),
        basis=basis(challenger, reference),
        notes=tuple(notes(contestants, challenger, reference)),
        warnings=warnings,
        differences=_differences(contestants),
    )


def _mismatches(runs: Sequence[RunRecord]) -> Iterator[str]:
    reference = runs[0]
    for run in runs[1:]:
        differ = [what for key, what in FINGERPRINTS.items() if run.environment[key] != reference.environment[key]]
        if differ:
            hint = " (only bits per byte would mean the same)" if differ == ["tokenizer"] else ""
            names = f"{reference.name} and {run.name}"
            yield f"{names} differ in {listed(differ)}, so their losses do not compare{hint}."


def _differences(contestants: Sequence[Contestant]) -> dict[str, dict[str, Any]]:
    """A group's seeds are one value."""
    flat = []
    for contestant in contestants:
        values = flatten(contestant.config)
        if len(contestant.runs) > 1:
            values["seed"] = ", ".join(map(str, contestant.seeds))
        flat.append(values)
    keys = dict.fromkeys(key for values in flat for key in values if key != "name")
    return {
        key: {contestant.name: values.get(key) for contestant, values in zip(contestants, flat, strict=True)}
        for key in keys
        if any(values.get(key) != flat[0].get(key) for values in flat)
    }
