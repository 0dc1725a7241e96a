"""A ladder's results: multipliers and fits on each axis, the frontier, and the sentences that say them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moelm.compare.axes import AXIS_NAMES, Axis, cost_with_unit
from moelm.compare.bootstrap import CONFIDENCE
from moelm.compare.comparison import few_documents, mismatches
from moelm.compare.ladder.fit import MIN_SIZES, LadderFit, fit_ladder
from moelm.compare.ladder.multiplier import Multiplier, multipliers
from moelm.compare.ladder.points import Ladder, Points, Side
from moelm.compare.reading import SAME_COST
from moelm.compare.verdict import load_notes
from moelm.errors import MoelmError
from moelm.formats import count_noun, join_names

LADDER_AXES: tuple[Axis, ...] = ("flops", "seconds", "tokens")
_COSTS: Mapping[Axis, str] = {"flops": "compute", "seconds": "time", "tokens": "tokens"}


@dataclass(frozen=True, eq=False)
class AxisResult:
    """Everything on one axis of cost."""

    axis: Axis
    points: tuple[Points, ...]
    """Of each side."""
    multipliers: tuple[tuple[Multiplier, ...], ...]
    """Of each side but the reference, in each size."""
    means: tuple[Multiplier, ...]
    """Of each side but the reference: the geometric mean over its sizes in the reference's measured range."""
    fit: LadderFit | None
    """None with fewer than four sizes of a side."""
    frontier: tuple[tuple[str, str], ...]
    """Side and size of the points that no other point is both cheaper and better than, the cheapest first."""


@dataclass(frozen=True, eq=False)
class LadderComparison:
    """All results that a ladder's report contains."""

    ladder: Ladder
    results: tuple[AxisResult, ...]
    """FLOPs, and of seconds and tokens those that increase from size to size."""
    answer: str
    """The multiplier of the best side, its interval and its range."""
    details: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def compare_ladder(sides: Sequence[Side]) -> LadderComparison:
    """Compare the sides of a ladder; the first is the reference.

    Raises:
        MoelmError: there are fewer than two sides, or their runs are on different data.
    """
    if len(sides) < 2:
        raise MoelmError("A ladder needs at least two variants.")
    ladder = Ladder(tuple(sides))
    runs = [run for variant in ladder.variants for run in variant.all_runs]
    if different := list(mismatches(runs)):
        raise MoelmError(different[0])
    # FLOPs increase in any case, see `make_side`.
    results = tuple(_compare_on(axis, ladder) for axis in LADDER_AXES if axis == "flops" or _increases(ladder, axis))
    best = max(range(1, len(sides)), key=lambda i: results[0].means[i - 1].value or 0.0)
    others = [i for i in range(1, len(sides)) if i != best]
    return LadderComparison(
        ladder=ladder,
        results=results,
        answer=_answer(ladder, results, best),
        details=(*(_answer(ladder, results, i) for i in others), *_fit_sentences(ladder, results[0])),
        notes=(*_notes(ladder, results), *load_notes(runs)),
        warnings=tuple(few_documents(ladder.variants[0])),
    )


def _increases(ladder: Ladder, axis: Axis) -> bool:
    """Whether larger sizes cost more; all sizes may have the same tokens, and times may have been disturbed."""
    return all((np.diff(ladder.points(side, axis).costs_P) > SAME_COST).all() for side in ladder.sides)


def _compare_on(axis: Axis, ladder: Ladder) -> AxisResult:
    points = tuple(ladder.points(side, axis) for side in ladder.sides)
    found = [multipliers(points[0], each) for each in points[1:]]
    return AxisResult(
        axis=axis,
        points=points,
        multipliers=tuple(tuple(each) for each, _ in found),
        means=tuple(mean for _, mean in found),
        fit=fit_ladder(points),
        frontier=_frontier(ladder, points),
    )


def _frontier(ladder: Ladder, points: Sequence[Points]) -> tuple[tuple[str, str], ...]:
    everything = sorted(
        (float(cost), float(loss), side.name, size)
        for side, each in zip(ladder.sides, points, strict=True)
        for size, cost, loss in zip(side.sizes, each.costs_P, each.losses_P, strict=True)
    )
    frontier, lowest = [], float("inf")
    for _, loss, side, size in everything:
        if loss < lowest:
            frontier.append((side, size))
            lowest = loss
    return tuple(frontier)


def _answer(ladder: Ladder, results: Sequence[AxisResult], index: int) -> str:
    """The multipliers of one side in a sentence."""
    side, reference = ladder.sides[index], ladder.sides[0]
    clauses = [f"{_describe(each.means[index - 1])} {_COSTS[each.axis]}" for each in results]
    inside = [each.read == "measured range" for each in results[0].multipliers[index - 1]]
    measured = [variant for variant, known in zip(side.sizes.values(), inside, strict=True) if known]
    if not measured:
        return (
            f"None of the losses of {side.name} are in the range of those of {reference.name}, so there is no multiplier."
        )
    ends = [cost_with_unit("flops", float(variant.cost("flops")[-1])) for variant in (measured[0], measured[-1])]
    where = f"at {ends[0]}" if len(measured) == 1 else f"from {ends[0]} to {ends[1]}, mean over {len(measured)} sizes"
    return f"For the losses of {side.name}, {reference.name} needs {join_names(clauses)} ({where})."


def _describe(multiplier: Multiplier) -> str:
    """`2.10 times (95%: 1.85 to 2.40) the`, before the name of the cost."""
    if multiplier.value is None:
        return "an unknown multiple of the"
    low, high = ("?" if bound is None else f"{bound:.2f}" for bound in (multiplier.low, multiplier.high))
    return f"{multiplier.value:.2f} times ({CONFIDENCE:.0%}: {low} to {high}) the"


def _fit_sentences(ladder: Ladder, result: AxisResult) -> Iterator[str]:
    fit = result.fit
    if fit is None:
        yield (
            f"There is no fit: it needs {MIN_SIZES} sizes of each variant, and there are "
            f"{join_names([f'{len(side.sizes)} of {side.name}' for side in ladder.sides])}. Multipliers are read between "
            "the measured sizes."
        )
        return
    laws = [
        f"{law.exponent:.3f} ({law.exponent_low:.3f} to {law.exponent_high:.3f}) for {side.name}"
        for side, law in zip(ladder.sides, fit.laws, strict=True)
    ]
    yield f"The fit L(C) = E + A C^-a over FLOPs has the exponents a of {join_names(laws)}."
    if fit.floor_identified:
        interval = f"{CONFIDENCE:.0%}: {fit.floor_low:.2f} to {fit.floor_high:.2f}"
        yield f"The loss that no compute removes, E, is {fit.floor:.2f} nats per token ({interval})."
    else:
        yield "E, the loss that no compute removes, is not identified: very different values fit these sizes as well."


def _notes(ladder: Ladder, results: Sequence[AxisResult]) -> Iterator[str]:
    if ladder.document_losses_RP is None:
        yield "Intervals are over seeds only: not all runs have saved their losses on the same documents."
    if ladder.seed_std is None:
        yield "Intervals are over documents only: no variant has two seeds in any size."
    single = [variant.name for variant in ladder.variants if len(variant.runs) == 1]
    if single and ladder.seed_std is not None:
        yield f"The variation between seeds of {join_names(single)}, with one seed, is taken from the other sizes."
    for variant in ladder.variants:
        if not variant.is_complete:
            yield f"{variant.name} was last evaluated at step {variant.val.steps[-1]:,.0f}, before its end."
    for side, each in zip(ladder.sides[1:], results[0].multipliers, strict=True):
        outside = [size for size, found in zip(side.sizes, each, strict=True) if found.read != "measured range"]
        if outside:
            yield (
                f"The loss of {side.name} in {join_names(outside)} is outside the measured losses of "
                f"{ladder.sides[0].name}: its multiplier there is extrapolated or unknown, and not in the mean."
            )
    left_out = [_COSTS[axis] for axis in LADDER_AXES if axis not in [each.axis for each in results]]
    if left_out:
        yield f"There is no comparison by {join_names(left_out)}, which do not increase with the size."
    sizes = {side.name: count_noun(len(side.sizes), "size") for side in ladder.sides}
    if len(set(sizes.values())) > 1:
        yield f"There are {join_names([f'{number} of {name}' for name, number in sizes.items()])}."


def axis_title(axis: Axis) -> str:
    """`FLOPs`, `time` or `tokens`, for tables and figures."""
    return "time" if axis == "seconds" else AXIS_NAMES[axis]
