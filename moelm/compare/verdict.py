"""The sentences of a report: the verdict, its confidence, relative sizes, and notes on how to read it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moelm.compare.axes import AXIS_NAMES, Axis, format_cost
from moelm.compare.bootstrap import CONFIDENCE, BootstrapInterval
from moelm.compare.pairwise import NEGLIGIBLE, PairResult
from moelm.compare.reading import has_ends, read_loss
from moelm.compare.seed_std import MAX_SEEDS
from moelm.compare.variants import Variant, runs_by_config
from moelm.config import OptimConfig
from moelm.formats import count_noun, join_names, quantity
from moelm.runs.cpu_load import CpuUse
from moelm.runs.record import LOSSY_NOTE, RunRecord

SAME_SIZE = 0.03
"""Relative difference below which two sizes count as equal; a router adds about one percent."""

MOST_NAMES = 4
"""Number of runs that a note names; of more, it says how many."""

_COST_NOUNS: Mapping[Axis, tuple[str, str, str]] = {
    "tokens": ("tokens", "fewer", "as many"),
    "flops": ("FLOPs", "fewer", "as many"),
    "seconds": ("time", "less", "as much"),
    "dollars": ("money", "less", "as much"),
}


@dataclass(frozen=True)
class Verdict:
    """The result of the challenger against the reference, in sentences."""

    winner: str | None
    """The variant that is better at equal cost on every axis, or None."""
    sentence: str
    """Who is better, and by how much, at equal cost on each axis."""
    confidence: str
    """The confidence interval of the difference at the end."""
    efficiency: str
    """The cost at which the better variant reached the other's final loss."""
    sizes: str
    """The sizes in which the two are equal, and those in which they differ."""


def decide(challenger: Variant, reference: Variant, pairs: Sequence[PairResult]) -> Verdict:
    """The verdict on two variants, with the winner as the subject, or else the challenger."""
    by_names = {(pair.a, pair.b): pair for pair in pairs}
    pair = by_names[challenger.name, reference.name]
    if _outcomes(pair) & {"better", "worse"} == {"worse"}:
        pair = by_names[reference.name, challenger.name]
    outcomes = _outcomes(pair)
    if {"better", "worse"} <= outcomes:
        head = "Split result"
    elif "better" in outcomes:
        head = f"{pair.a} wins" if outcomes == {"better"} else f"{pair.a} wins in part"
    elif all(equal is not None and equal.negligible for equal in pair.equal_cost.values()):
        head = "Tie"
    else:
        head = "Undecided" if outcomes == {"tie"} else "No verdict"
    subject = "its" if head.startswith(f"{pair.a} wins") else f"{pair.a}'s"
    clauses = join_names([_clause(pair, axis) for axis in pair.equal_cost])
    better, other = sorted((challenger, reference), key=lambda variant: float(variant.val.loss[-1]))
    best = by_names[better.name, other.name]
    return Verdict(
        winner=pair.a if outcomes == {"better"} else None,
        sentence=f"{head}: against {pair.b}, {subject} validation loss is {clauses}.",
        confidence=_confidence(best),
        efficiency=_efficiency(best),
        sizes=_sizes(challenger, reference),
    )


def _outcomes(pair: PairResult) -> set[str]:
    return {
        "unknown" if equal is None else "tie" if equal.tie else "better" if equal.gain > 0 else "worse"
        for equal in pair.equal_cost.values()
    }


def _clause(pair: PairResult, axis: Axis) -> str:
    equal = pair.equal_cost[axis]
    if equal is None:
        return f"not measured at equal {AXIS_NAMES[axis]}"
    losses = f"{equal.loss_a:.3f} against {equal.loss_b:.3f}"
    if equal.tie:
        difference = f"the same within {NEGLIGIBLE} nats" if equal.negligible else "not significantly different"
        return f"{difference} at equal {AXIS_NAMES[axis]} ({losses})"
    if equal.interval is not None and abs(equal.gain - equal.interval.gain) < 5e-4:
        low, high = sorted((abs(equal.interval.low), abs(equal.interval.high)))
        losses += f"; {CONFIDENCE:.0%}: {low:.3f} to {high:.3f}"
    if equal.seeds_shared > 1:
        number = equal.seeds_ahead if equal.gain > 0 else equal.seeds_shared - equal.seeds_ahead
        losses += f"; {'ahead' if equal.gain > 0 else 'behind'} in {number} of {equal.seeds_shared} seeds"
    sign = "lower" if equal.gain > 0 else "higher"
    return f"{abs(equal.gain):.3f} nats {sign} at equal {AXIS_NAMES[axis]} ({losses})"


def _confidence(pair: PairResult) -> str:
    if pair.paired is None:
        return "The uncertainty of the difference is unknown: not all runs have saved their losses on each document."
    interval = pair.paired.overall
    basis = f"over {count_noun(interval.documents, 'evaluation document')}"
    if interval.effective_documents < 0.5 * interval.documents:
        basis += f" (equivalent to {interval.effective_documents:.0f} of equal length)"
    if interval.seeds_from is not None:
        basis += f" and the variation between seeds in {interval.seeds_from}"
    elif interval.seeds_included:
        a, b = interval.seeds
        basis += f" and {count_noun(a, 'seed')}" if a == b else f" and {a} against {count_noun(b, 'seed')}"
    else:
        basis += "; variation between seeds is not included"
    return (
        f"At the end, {pair.a}'s loss is {interval.gain:.3f} nats below {pair.b}'s, "
        f"with a {CONFIDENCE:.0%} confidence interval of {interval.low:.3f} to {interval.high:.3f} {basis}."
        f"{_what_would_decide(interval)}"
    )


def _what_would_decide(interval: BootstrapInterval) -> str:
    if not interval.undecided or not interval.seeds_included:
        return ""
    if interval.seeds_to_decide is None:
        return f" A difference of this size would not be decided by {MAX_SEEDS:,} seeds of each on these documents."
    return f" A difference of this size would be decided by {interval.seeds_to_decide} seeds of each."


def _efficiency(pair: PairResult) -> str:
    parts = []
    for axis, reached in pair.cost_to_reach.items():
        if reached.cost is None or reached.ratio is None:
            continue
        noun, less, equal = _COST_NOUNS[axis]
        times = f"{reached.ratio:.2f}× {less}" if reached.ratio >= 1 else f"{1 / reached.ratio:.2f}× more"
        if f"{reached.ratio:.2f}" == "1.00":
            times = equal
        if reached.at_most:
            times = f"at least {times}" if reached.ratio >= 1 else f"at most {times}"
        costs = f"{format_cost(axis, reached.cost)} against {format_cost(axis, reached.other_cost)}"
        if reached.ratio_low is not None and reached.ratio_high is not None:
            costs += f"; {CONFIDENCE:.0%} of the ratio over seeds: {reached.ratio_low:.2f} to {reached.ratio_high:.2f}"
        parts.append(f"{times} {noun} ({costs})")
    if not parts:
        return f"{pair.a} does not reach {pair.b}'s final loss of {pair.target_loss:.3f}."
    return f"{pair.a} reaches {pair.b}'s final loss of {pair.target_loss:.3f} with {join_names(parts)}."


def _sizes(challenger: Variant, reference: Variant) -> str:
    a, b = challenger.first, reference.first
    sizes = {
        "active parameters": (a.parameters["active"], b.parameters["active"]),
        "FLOPs per token": (a.flops_per_token, b.flops_per_token),
        "total parameters": (a.parameters["total"], b.parameters["total"]),
    }
    equal, different = [], []
    for name, (size_a, size_b) in sizes.items():
        if abs(size_a - size_b) <= SAME_SIZE * max(size_a, size_b):
            equal.append(name)
        else:
            different.append(f"{size_a / size_b:.2f}× the {name} ({quantity(size_a)} against {quantity(size_b)})")
    sentences = []
    if equal:
        names = f"{challenger.name} and {reference.name}"
        sentences.append(f"{names} are equal in {join_names(equal)} (within {SAME_SIZE:.0%})")
    if different:
        sentences.append(f"{challenger.name} has {join_names(different)}")
    return f"{'; '.join(sentences)}."


def reading_notes(
    variants: Sequence[Variant], challenger: Variant, reference: Variant, pairs: Sequence[PairResult]
) -> Iterator[str]:
    """Limitations of the comparison, one sentence each."""
    runs = [run for variant in variants for run in variant.all_runs]
    for run in runs:
        last, steps, init_from = int(run.val.steps[-1]), run.config.train.steps, run.config.init_from
        if last < steps:
            yield f"{run.name} was last evaluated at step {last:,} of {steps:,}."
        if init_from is not None:
            yield f"{run.name} was initialized from {init_from.run}, whose training cost is not included."
        if run.environment.get("lossy"):
            yield f"The tokenizer of {run.name} {LOSSY_NOTE}"
    for variant in variants:
        common = variant.val.steps[-1]
        if any(run.val.steps[-1] > common for run in variant.runs):
            yield f"{variant.name} is compared at step {common:,.0f}, the last at which all of its runs were evaluated."
    if len(variants) > 2:
        yield (
            f"{challenger.name} was selected as the best of {len(variants) - 1} by the same losses; "
            "its confidence interval is not corrected for that."
        )
    yield from _schedule_notes(challenger, reference)
    yield from _bound_notes(next(pair for pair in pairs if (pair.a, pair.b) == (challenger.name, reference.name)))
    optimizers = dict.fromkeys(_describe_optimizer(run.config.optim) for run in runs)
    if len(optimizers) > 1:
        yield (
            f"The optimizer differs ({', '.join(optimizers)}); FLOPs are those of the model, so the cost of the update is "
            "only in the time."
        )
    for key in ("device", "processes", "threads", "precision", "torch"):
        values = [str(run.environment.get(key, "–")) for run in runs]
        if len(set(values)) > 1:
            yield f"Times are not comparable: {key} differs ({', '.join(dict.fromkeys(values))})."
    yield from load_notes(runs)
    lengths = [length for variant in variants for length in variant.lengths]
    variation = max(length.final_seconds.max() / length.final_seconds.min() - 1 for length in lengths)
    if variation > 0.05:
        yield f"Runs of one variant took up to {variation:.0%} more time for equal work; times are uncertain by as much."
    yield from _seed_notes(variants)


def _describe_optimizer(optim: OptimConfig) -> str:
    """Its kind, and the roles that have another."""
    roles = [role for role, settings in optim.groups if settings.optimizer not in (None, optim.kind)]
    return f"{optim.kind} with adamw for {join_names(roles)}" if roles else optim.kind


def load_notes(runs: Sequence[RunRecord]) -> Iterator[str]:
    """The runs that other processes disturbed, in one sentence for each number of CPUs and threads."""
    disturbed: dict[tuple[int, int], list[tuple[str, CpuUse]]] = {}
    for run in runs:
        cpus, threads, processes = (run.environment.get(key) for key in ("cpus", "threads", "processes"))
        if not isinstance(cpus, int) or run.cpu_use is None:
            continue
        used = threads * processes if isinstance(threads, int) and isinstance(processes, int) else cpus
        if run.cpu_use.describe_load(cpus, used) is not None:
            disturbed.setdefault((cpus, used), []).append((run.name, run.cpu_use))
    for (cpus, used), loaded in disturbed.items():
        names = [name for name, _ in loaded]
        if len(names) > MOST_NAMES:
            names = [*names[: MOST_NAMES - 1], count_noun(len(names) - MOST_NAMES + 1, "other run")]
        columns = zip(*(use for _, use in loaded), strict=True)
        load = CpuUse(*map(max, columns)).describe_load(cpus, used)
        most, its = ("in the worst case, ", "their") if len(names) > 1 else ("", "its")
        yield f"The machine was not idle while {join_names(names)} trained ({most}{load}); {its} times are uncertain."


def _schedule_notes(challenger: Variant, reference: Variant) -> Iterator[str]:
    """How the two were read at equal cost, where that is not at the end of their learning rate schedules."""
    for axis in ("tokens", "flops", "seconds"):
        ends = {variant.name: float(variant.cost(axis)[-1]) for variant in (challenger, reference)}
        at = min(ends.values())
        for variant in (challenger, reference):
            read, part = read_loss(variant, axis, at).read, at / ends[variant.name]
            where = f"At equal {AXIS_NAMES[axis]}, {variant.name} is"
            if read == "between completed runs":
                steps = join_names([f"{length.first.config.train.steps:,}" for length in variant.lengths])
                yield f"{where} read between the ends of its completed runs, of {steps} steps."
            elif read == "in mid-schedule" and part < 0.99 and variant.first.config.optim.schedule != "constant":
                yield (
                    f"{where} compared at {part:.0%} of its training, before its learning rate has decayed, which puts it "
                    "at a disadvantage; a shorter run of it (another train.steps, and --group) would be read at its end."
                )
            if variant.shorter and not has_ends(variant, axis):
                yield (
                    f"Longer runs of {variant.name} did not take more {_COST_NOUNS[axis][0]} than shorter ones, so only "
                    f"the longest are read at equal {AXIS_NAMES[axis]}."
                )


def _bound_notes(pair: PairResult) -> Iterator[str]:
    axes = [AXIS_NAMES[axis] for axis, reached in pair.cost_to_reach.items() if reached.at_most]
    if axes:
        yield (
            f"The shortest completed runs of {pair.a} end below {pair.b}'s final loss, so their cost is an upper bound of "
            f"the cost to reach it ({', '.join(axes)})."
        )


def _seed_notes(variants: Sequence[Variant]) -> Iterator[str]:
    seeds = {seed for variant in variants for seed in variant.seeds}
    if len(seeds) == 1:
        yield f"All runs share seed {seeds.pop()}; the spread between seeds is not measured here."
    single = [variant.first for variant in variants if len(variant.runs) == 1]
    for group in runs_by_config(single):
        if len({run.config.seed for run in group}) > 1:
            names = join_names([run.name for run in group])
            what = "their seed" if len({run.config.train.steps for run in group}) == 1 else "their seed and train.steps"
            yield f"{names} differ only in {what}; --group combines them into one variant."
