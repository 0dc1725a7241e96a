"""What runs say about each other: who needs how much to reach whose loss, and who leads at equal cost.

Pure computation on `RunRecord`s, and the words for its results; files and pictures live in `report` and
`plots`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moelm.analysis.runs import FINGERPRINTS, Array, Curve, RunRecord
from moelm.errors import MoelmError

Axis = Literal["tokens", "flops", "seconds"]

AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds")
AXIS_NAMES: Mapping[Axis, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "wall-clock"}
TIE = 0.005
"""Nats per token under which two losses count as equal."""
SAME_SIZE = 0.03
"""Relative difference under which two sizes count as equal; a router adds about a percent."""


@dataclass(frozen=True)
class Need:
    """What one run spends until it is as good as another run at its end."""

    need: float | None
    """Tokens, FLOPs or seconds; None when it is not reached."""
    total: float
    """What the other run spent to get there."""

    @property
    def ratio(self) -> float | None:
        """Above 1, the run is that many times as thrifty as the other."""
        return self.total / self.need if self.need else None


@dataclass(frozen=True)
class Equal:
    """The losses of two runs where both have spent the same."""

    at: float
    """Tokens, FLOPs or seconds: the most that both runs have spent."""
    loss_a: float
    loss_b: float

    @property
    def gain(self) -> float:
        """Nats by which the first run is better."""
        return self.loss_b - self.loss_a

    @property
    def tie(self) -> bool:
        """Whether the difference is too small to name a winner."""
        return abs(self.gain) < TIE - 1e-9  # a difference of two decimal losses is off by a few ulps


@dataclass(frozen=True)
class Pair:
    """Run `a` measured against run `b`."""

    a: str
    b: str
    target: float
    """Final validation loss of `b`, in nats per token."""
    needs: Mapping[Axis, Need]
    equal: Mapping[Axis, Equal | None]
    """None where the runs were never evaluated at a common cost."""


@dataclass(frozen=True)
class Verdict:
    """The answer in words."""

    winner: str | None
    """The run that leads at equal tokens, FLOPs and wall-clock alike; None otherwise."""
    sentence: str
    reach: str
    """What the better run needed to reach the other's final loss."""


@dataclass(frozen=True)
class Comparison:
    """Everything a report tells."""

    runs: tuple[RunRecord, ...]
    """The first is the reference."""
    pairs: tuple[Pair, ...]
    """Every ordered pair."""
    challenger: str
    """The run that the verdict sets against the reference: of the others, the lowest final loss."""
    verdict: Verdict
    basis: str
    """In what the challenger and the reference are of equal size, and in what not."""
    notes: tuple[str, ...]
    """What a careful reader should know before quoting the verdict."""
    warnings: tuple[str, ...]
    """Why these runs are not comparable; empty unless forced."""
    differences: Mapping[str, Mapping[str, Any]]
    """Dotted config key to each run's value, for the keys in which runs differ."""

    def pair(self, a: str, b: str) -> Pair:
        """The measurements of run `a` against run `b`."""
        return next(pair for pair in self.pairs if (pair.a, pair.b) == (a, b))


def compare(runs: Sequence[RunRecord], force: bool = False) -> Comparison:
    """Set runs against each other; the first is the reference.

    Raises:
        MoelmError: fewer than two runs, or runs on different data without `force`.
    """
    if len(runs) < 2:
        raise MoelmError("A comparison needs at least two runs.")
    warnings = tuple(_mismatches(runs))
    if warnings and not force:
        raise MoelmError(f"{' '.join(warnings)} Use --force to compare the runs all the same.")
    reference = runs[0]
    challenger = min(runs[1:], key=lambda run: run.val.loss[-1])
    pairs = tuple(_measure(a, b) for a, b in itertools.permutations(runs, 2))
    verdict = _verdict(challenger, reference, pairs)
    return Comparison(
        runs=tuple(runs),
        pairs=pairs,
        challenger=challenger.name,
        verdict=verdict,
        basis=_basis(challenger, reference),
        notes=tuple(_notes(runs, challenger, reference)),
        warnings=warnings,
        differences=_differences(runs),
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


def losses_at_equal(a: Curve, b: Curve, axis: Axis) -> Equal | None:
    """Both losses at the largest cost that both reached, linear between evaluations; None without overlap."""
    xa, xb = getattr(a, axis), getattr(b, axis)
    at = min(xa[-1], xb[-1])
    if at < max(xa[0], xb[0]):
        return None
    return Equal(float(at), float(np.interp(at, xa, a.loss)), float(np.interp(at, xb, b.loss)))


def amount(axis: Axis, x: float) -> str:
    """A cost with its unit: `4.9M tokens`, `1.2e15 FLOPs`, `8.5 min`."""
    if axis == "tokens":
        return f"{quantity(x)} tokens"
    return f"{exponent(x)} FLOPs" if axis == "flops" else duration(x)


def quantity(x: float) -> str:
    """A count in three digits or fewer: `850`, `4.9M`, `181M`."""
    scaled = float(x)
    for unit in ("", "K", "M", "B", "T"):
        if scaled < 999.5 or unit == "T":
            break
        scaled /= 1000
    return f"{scaled:.0f}{unit}" if not unit or scaled >= 99.95 else f"{scaled:.1f}{unit}"


def exponent(x: float) -> str:
    """A large number as `1.2e15`."""
    digits, _, power = f"{x:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def duration(seconds: float) -> str:
    """A time in the unit in which it is easiest to read."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _mismatches(runs: Sequence[RunRecord]) -> Iterator[str]:
    reference = runs[0]
    for run in runs[1:]:
        differ = [what for key, what in FINGERPRINTS.items() if run.environment[key] != reference.environment[key]]
        if differ:
            hint = " (only bits per byte would mean the same)" if differ == ["tokenizer"] else ""
            names = f"{reference.name} and {run.name}"
            yield f"{names} differ in {_listed(differ)}, so their losses do not compare{hint}."


def _measure(a: RunRecord, b: RunRecord) -> Pair:
    target = float(b.val.loss[-1])
    return Pair(
        a=a.name,
        b=b.name,
        target=target,
        needs={
            axis: Need(first_reach(getattr(a.val, axis), a.val.loss, target), float(getattr(b.val, axis)[-1]))
            for axis in AXES
        },
        equal={axis: losses_at_equal(a.val, b.val, axis) for axis in AXES},
    )


def _verdict(challenger: RunRecord, reference: RunRecord, pairs: Sequence[Pair]) -> Verdict:
    """Told from the side of the winner, or of the challenger when there is none."""
    by_names = {(pair.a, pair.b): pair for pair in pairs}
    pair = by_names[challenger.name, reference.name]
    leads = {_lead(pair.equal[axis]) for axis in AXES}
    if "behind" in leads and "ahead" not in leads:
        pair = by_names[reference.name, challenger.name]
        leads = {_lead(pair.equal[axis]) for axis in AXES}
    winner = pair.a if leads == {"ahead"} else None
    if "ahead" in leads and "behind" in leads:
        head, whose = "Split result", f"{pair.a}'s"
    elif "ahead" in leads:
        head, whose = f"{pair.a} wins" if winner else f"{pair.a} wins in part", "its"
    else:
        head, whose = "Tie" if leads == {"even"} else "No verdict", f"{pair.a}'s"
    clauses = [_clause(pair.equal[axis], axis) for axis in AXES]
    sentence = f"{head}: against {pair.b}, {whose} validation loss is {_listed(clauses)}."

    better, other = sorted((challenger, reference), key=lambda run: float(run.val.loss[-1]))
    return Verdict(winner, sentence, _reach(by_names[better.name, other.name]))


def _lead(equal: Equal | None) -> str:
    if equal is None:
        return "unknown"
    return "even" if equal.tie else "ahead" if equal.gain > 0 else "behind"


def _clause(equal: Equal | None, axis: Axis) -> str:
    if equal is None:
        return f"not measured at equal {AXIS_NAMES[axis]}"
    losses = f"{equal.loss_a:.3f} to {equal.loss_b:.3f}"
    if equal.tie:
        return f"level at equal {AXIS_NAMES[axis]} ({losses})"
    word = "lower" if equal.gain > 0 else "higher"
    return f"{abs(equal.gain):.3f} nats {word} at equal {AXIS_NAMES[axis]} ({losses})"


_SPENT: Mapping[Axis, tuple[str, str, Callable[[float], str]]] = {
    "tokens": ("tokens", "fewer", quantity),
    "flops": ("FLOPs", "fewer", exponent),
    "seconds": ("time", "less", duration),
}


def _reach(pair: Pair) -> str:
    parts = []
    for axis in AXES:
        need = pair.needs[axis]
        if need.need is None or need.ratio is None:
            continue
        unit, few, words = _SPENT[axis]
        times = f"{need.ratio:.2f}× {few}" if need.ratio >= 1 else f"{1 / need.ratio:.2f}× more"
        parts.append(f"{times} {unit} ({words(need.need)} against {words(need.total)})")
    if not parts:
        return f"{pair.a} does not reach {pair.b}'s final loss of {pair.target:.3f}."
    return f"{pair.a} reaches {pair.b}'s final loss of {pair.target:.3f} with {_listed(parts)}."


def _basis(challenger: RunRecord, reference: RunRecord) -> str:
    sizes = {
        "active parameters": (challenger.parameters["active"], reference.parameters["active"]),
        "FLOPs per token": (challenger.flops_per_token, reference.flops_per_token),
        "total parameters": (challenger.parameters["total"], reference.parameters["total"]),
    }
    alike, apart = [], []
    for what, (mine, theirs) in sizes.items():
        if abs(mine - theirs) <= SAME_SIZE * max(mine, theirs):
            alike.append(what)
        else:
            apart.append(f"{mine / theirs:.2f}× the {what} ({quantity(mine)} against {quantity(theirs)})")
    if not alike:
        return f"{challenger.name} has {_listed(apart)}."
    same = f"{challenger.name} and {reference.name} are equal in {_listed(alike)} (within {SAME_SIZE:.0%})"
    if not apart:
        return f"{same}."
    return f"{same}; {challenger.name} has {_listed(apart)}."


def _notes(runs: Sequence[RunRecord], challenger: RunRecord, reference: RunRecord) -> Iterator[str]:
    for run in runs:
        last, steps = int(run.val.steps[-1]), run.config.train.steps
        if last < steps:
            yield f"{run.name} was last evaluated at step {last:,} of its {steps:,}."
        if run.config.start is not None:
            yield f"{run.name} began with the weights of {run.config.start.run}; what those cost is in none of its figures."
    for axis in AXES:
        equal = losses_at_equal(challenger.val, reference.val, axis)
        for run in (challenger, reference) if equal else ():
            total = float(getattr(run.val, axis)[-1])
            if equal and equal.at < 0.99 * total and run.config.optim.schedule != "constant":
                yield (
                    f"At equal {AXIS_NAMES[axis]} {run.name} is read {equal.at / total:.0%} of the way "
                    "through, before its learning rate has come down, which counts against it."
                )
    for key in ("device", "processes", "threads", "precision", "torch"):
        values = [str(run.environment.get(key, "–")) for run in runs]
        if len(set(values)) > 1:
            yield f"Seconds are not like for like: {key} differs ({', '.join(dict.fromkeys(values))})."
    if len({run.config.seed for run in runs}) == 1:
        yield f"All runs share seed {reference.config.seed}; the spread between seeds is not measured here."


def _differences(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    flat = [dict(_flatten(run.config.model_dump(mode="json"))) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key != "name")
    return {
        key: {run.name: values.get(key) for run, values in zip(runs, flat, strict=True)}
        for key in keys
        if any(values.get(key) != flat[0].get(key) for values in flat)
    }


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict | list):
        yield prefix, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
