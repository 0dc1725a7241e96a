"""The answer in words, and what a careful reader should know before quoting it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moelm.analysis.contestants import AXIS_NAMES, Axis, Contestant, groups_of
from moelm.analysis.intervals import LEVEL, Interval
from moelm.analysis.measures import Equal, Pair
from moelm.analysis.words import counted, dollars, duration, exponent, listed, quantity

SAME_SIZE = 0.03
"""Relative difference under which two sizes count as equal; a router adds about a percent."""

_SPENT: Mapping[Axis, tuple[str, str, Callable[[float], str]]] = {
    "tokens": ("tokens", "fewer", quantity),
    "flops": ("FLOPs", "fewer", exponent),
    "seconds": ("time", "less", duration),
    "dollars": ("money", "less", dollars),
}


@dataclass(frozen=True)
class Verdict:
    """The answer in words."""

    winner: str | None
    """The contestant that leads at equal cost on every axis; None otherwise."""
    sentence: str
    sureness: str
    """How sure the difference at the end is."""
    reach: str
    """What the better contestant needed to reach the other's final loss."""


def judge(challenger: Contestant, reference: Contestant, pairs: Sequence[Pair]) -> Verdict:
    """Told from the side of the winner, or of the challenger when there is none."""
    by_names = {(pair.a, pair.b): pair for pair in pairs}
    pair = by_names[challenger.name, reference.name]
    leads = {_lead(equal) for equal in pair.equal.values()}
    if "behind" in leads and "ahead" not in leads:
        pair = by_names[reference.name, challenger.name]
        leads = {_lead(equal) for equal in pair.equal.values()}
    winner = pair.a if leads == {"ahead"} else None
    if "ahead" in leads and "behind" in leads:
        head, whose = "Split result", f"{pair.a}'s"
    elif "ahead" in leads:
        head, whose = f"{pair.a} wins" if winner else f"{pair.a} wins in part", "its"
    else:
        level = all(equal is not None and equal.level for equal in pair.equal.values())
        head, whose = "Tie" if level else "Undecided" if leads == {"even"} else "No verdict", f"{pair.a}'s"
    clauses = [_clause(pair, axis) for axis in pair.equal]
    sentence = f"{head}: against {pair.b}, {whose} validation loss is {listed(clauses)}."
    better, other = sorted((challenger, reference), key=lambda each: float(each.val.loss[-1]))
    best = by_names[better.name, other.name]
    return Verdict(winner, sentence, _sureness(best), _reach(best))


def interval_words(interval: Interval) -> str:
    """`+0.031 to +0.042`."""
    return f"{interval.low:+.3f} to {interval.high:+.3f}"


def _sureness(pair: Pair) -> str:
    if pair.paired is None:
        return "How sure that is, is not known: not all of the runs have kept their losses on each document at this step."
    found = pair.paired.whole
    drawn = f"over {counted(found.documents, 'evaluation document')}"
    if found.effective < 0.5 * found.documents:
        drawn += f" (which weigh as much as {found.effective:.0f} of equal length)"
    if found.scatter:
        mine, theirs = found.seeds
        drawn += f" and {counted(mine, 'seed')}" if mine == theirs else f" and {mine} against {counted(theirs, 'seed')}"
    else:
        drawn += "; another seed may say otherwise"
    return (
        f"At the end {pair.a} is {found.gain:.3f} below {pair.b}, between {found.low:.3f} and {found.high:.3f} "
        f"with {LEVEL:.0%} confidence {drawn}."
    )


def _lead(equal: Equal | None) -> str:
    if equal is None:
        return "unknown"
    return "even" if equal.tie else "ahead" if equal.gain > 0 else "behind"


def _clause(pair: Pair, axis: Axis) -> str:
    equal = pair.equal[axis]
    if equal is None:
        return f"not measured at equal {AXIS_NAMES[axis]}"
    losses = f"{equal.loss_a:.3f} to {equal.loss_b:.3f}"
    if axis == "tokens" and pair.paired is not None and not equal.tie and abs(equal.gain - pair.paired.whole.gain) < 5e-4:
        low, high = sorted((abs(pair.paired.whole.low), abs(pair.paired.whole.high)))
        losses += f"; {LEVEL:.0%}: {low:.3f} to {high:.3f}"
    if equal.tie:
        return f"{'level' if equal.level else 'not surely different'} at equal {AXIS_NAMES[axis]} ({losses})"
    word = "lower" if equal.gain > 0 else "higher"
    return f"{abs(equal.gain):.3f} nats {word} at equal {AXIS_NAMES[axis]} ({losses})"


def _reach(pair: Pair) -> str:
    parts = []
    for axis, need in pair.needs.items():
        if need.need is None or need.ratio is None:
            continue
        unit, few, words = _SPENT[axis]
        times = f"{need.ratio:.2f}× {few}" if need.ratio >= 1 else f"{1 / need.ratio:.2f}× more"
        if f"{need.ratio:.2f}" == "1.00":
            times = f"as {'many' if few == 'fewer' else 'much'}"
        parts.append(f"{times} {unit} ({words(need.need)} against {words(need.total)})")
    if not parts:
        return f"{pair.a} does not reach {pair.b}'s final loss of {pair.target:.3f}."
    return f"{pair.a} reaches {pair.b}'s final loss of {pair.target:.3f} with {listed(parts)}."


def basis(challenger: Contestant, reference: Contestant) -> str:
    """In what the two are of equal size, and in what not."""
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
        return f"{challenger.name} has {listed(apart)}."
    same = f"{challenger.name} and {reference.name} are equal in {listed(alike)} (within {SAME_SIZE:.0%})"
    if not apart:
        return f"{same}."
    return f"{same}; {challenger.name} has {listed(apart)}."


def notes(contestants: Sequence[Contestant], challenger: Contestant, reference: Contestant) -> Iterator[str]:
    """What a careful reader should know."""
    runs = [run for contestant in contestants for run in contestant.runs]
    for run in runs:
        last, steps = int(run.val.steps[-1]), run.config.train.steps
        if last < steps:
            yield f"{run.name} was last evaluated at step {last:,} of its {steps:,}."
        if run.config.start is not None:
            yield f"{run.name} began with the weights of {run.config.start.run}; what those cost is in none of its figures."
    for each in contestants:
        common = each.val.steps[-1]
        if any(run.val.steps[-1] > common for run in each.runs):
            yield f"{each.name} is read at step {common:,.0f}, the last at which all of its runs were evaluated."
    if len(contestants) > 2:
        yield (
            f"{challenger.name} is the best of {len(contestants) - 1}, picked afterwards, "
            "for which its interval makes no allowance."
        )
    yield from _early(challenger, reference)
    for key in ("device", "processes", "threads", "precision", "torch"):
        values = [str(run.environment.get(key, "–")) for run in runs]
        if len(set(values)) > 1:
            yield f"Seconds are not like for like: {key} differs ({', '.join(dict.fromkeys(values))})."
    slower = max(each.seconds.max() / each.seconds.min() - 1 for each in contestants)
    if slower > 0.05:
        yield f"Runs of one contestant took up to {slower:.0%} more time for equal work; so unsure are the seconds."
    yield from _seeds(contestants)


def _early(challenger: Contestant, reference: Contestant) -> Iterator[str]:
    """Axes on which one of the two is read before its schedule is through."""
    for axis in ("tokens", "flops", "seconds"):
        ends = {each.name: float(each.cost(axis)[-1]) for each in (challenger, reference)}
        at = min(ends.values())
        for each in (challenger, reference):
            if at < 0.99 * ends[each.name] and each.config.optim.schedule != "constant":
                yield (
                    f"At equal {AXIS_NAMES[axis]} {each.name} is read {at / ends[each.name]:.0%} of the way "
                    "through, before its learning rate has come down, which counts against it."
                )


def _seeds(contestants: Sequence[Contestant]) -> Iterator[str]:
    runs = [run for contestant in contestants for run in contestant.runs]
    if len({run.config.seed for run in runs}) == 1:
        yield f"All runs share seed {runs[0].config.seed}; the spread between seeds is not measured here."
    alone = [contestant.runs[0] for contestant in contestants if len(contestant.runs) == 1]
    for group in groups_of(alone):
        if len({run.config.seed for run in group}) > 1:
            names = listed([run.name for run in group])
            yield f"{names} differ in nothing but their seed; --group takes them as one contestant."
