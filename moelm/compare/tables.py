"""The tables of a comparison as text, for the terminal, Markdown and HTML."""

import json
from typing import Any

from moelm.compare.axes import AXIS_NAMES, Axis, cost_with_unit, format_cost
from moelm.compare.bootstrap import BootstrapInterval
from moelm.compare.comparison import Comparison
from moelm.compare.pairwise import CostToReach, EqualCost, PairResult
from moelm.compare.seed_std import MAX_SEEDS
from moelm.compare.variants import Variant
from moelm.formats import duration, quantity
from moelm.report.table import NO_VALUE, Table
from moelm.runs.record import SYNTHETIC

ALL_PAIRS_UP_TO = 3
"""With more variants than this, tables show only pairs with the reference."""
ENVIRONMENT = ("moelm", "python", "torch", "platform", "device", "processes", "threads", "precision", "started")
"""Keys of environment.json in the table of versions."""


def report_tables(comparison: Comparison) -> tuple[Table, ...]:
    """All tables of the report, in reading order; tables without rows are left out."""
    tables = (
        runs_table(comparison),
        paired_table(comparison),
        _scaling_table(comparison),
        reach_table(comparison),
        _equal_cost_table(comparison),
        _domain_table(comparison, "Final loss by domain", synthetic=False),
        _domain_table(comparison, "Final loss by synthetic domain", synthetic=True),
        _seed_table(comparison),
        _config_table(comparison),
        _version_table(comparison),
    )
    return tuple(table for table in tables if table.rows)


def runs_table(comparison: Comparison) -> Table:
    """Sizes, losses and speed of each variant."""
    sizes = ("params total", "params active", "FLOPs/token", "tokens")
    losses = ("val loss final", "val loss best", "bpb final", "bpb best")
    grouped = any(len(variant.runs) > 1 for variant in comparison.variants)
    rows = []
    for variant in comparison.variants:
        first, rate, memory = variant.first, variant.tokens_per_second, variant.memory_peak
        values = [f"{x:.3f}" for curve in (variant.val.loss, variant.val.bpb) for x in (curve[-1], curve.min())]
        if variant.seed_std is not None:
            values[0] += f" ± {variant.seed_std:.3f}"
        rows.append(
            (
                variant.name,
                *([str(len(variant.runs))] if grouped else []),
                quantity(first.parameters["total"]),
                quantity(first.parameters["active"]),
                quantity(first.flops_per_token),
                quantity(variant.val.tokens[-1]),
                *values,
                quantity(rate) if rate else NO_VALUE,
                f"{memory / 2**30:.2f} GiB" if memory else NO_VALUE,
            )
        )
    title = "Variants (means over seeds ± standard deviation)" if grouped else "Runs"
    head = ("run", *(["seeds"] if grouped else []), *sizes, *losses, "tokens/s", "peak memory")
    return Table(title, head, tuple(rows))


def paired_table(comparison: Comparison) -> Table:
    """Each variant against the reference on the same documents; no rows without losses on documents."""
    reference = comparison.variants[0].name
    intervals = {pair.a: pair.paired.overall for pair in comparison.pairs if pair.b == reference and pair.paired}
    rows = [
        (name, *_gain_cells(interval), _decided_by(interval), f"{interval.better_documents:.0%}")
        for name, interval in intervals.items()
    ]
    head = ("run", "gain in nats", "95% interval", "decided by", "documents predicted better")
    return Table(f"At the end, against {reference} on the same documents", head, tuple(rows))


def reach_table(comparison: Comparison) -> Table:
    """What each variant spends to reach another's final loss."""
    rows = []
    for pair in _main_pairs(comparison):
        costs = (_cost_and_ratio(axis, pair.cost_to_reach[axis]) for axis in comparison.axes)
        rows.append((pair.a, f"{pair.b} at {pair.target_loss:.3f}", *costs))
    names = ["time" if axis == "seconds" else AXIS_NAMES[axis] for axis in comparison.axes]
    return Table("Cost to reach another run's final loss", ("run", "reaches", *names), tuple(rows), left=2)


def _scaling_table(comparison: Comparison) -> Table:
    """Final losses by the one setting in which the experts differ."""
    fit = comparison.scaling
    if fit is None:
        return Table("", (), ())
    rows = tuple(
        (
            name,
            f"{round(fit.values[name], 2):g}",
            f"{sum(losses) / len(losses):.3f}",
            ", ".join(f"{loss:.3f}" for loss in losses),
        )
        for name, losses in fit.losses.items()
    )
    return Table(f"Loss by {fit.description}", ("run", fit.setting.replace("_", "-"), "final loss", "of each seed"), rows)


def _equal_cost_table(comparison: Comparison) -> Table:
    """Each pair once, with the later variant first, so that a gain is a gain over the reference."""
    index = {variant.name: i for i, variant in enumerate(comparison.variants)}
    rows = []
    for pair in _main_pairs(comparison):
        if index[pair.a] < index[pair.b]:
            continue
        for axis in comparison.axes:
            equal = pair.equal_cost[axis]
            cells = (NO_VALUE,) * 7 if equal is None else _equal_cost_cells(axis, equal)
            rows.append((f"{pair.a} against {pair.b}", f"equal {AXIS_NAMES[axis]}", *cells))
    head = ("runs", "at", "cost", "loss", "loss of the other", "gain in nats", "95% interval", "seeds ahead", "read")
    return Table("Validation loss at equal cost", head, tuple(rows), left=2)


def _equal_cost_cells(axis: Axis, equal: EqualCost) -> tuple[str, ...]:
    gain = "tie" if equal.negligible else f"{equal.gain:+.3f}" + (" uncertain" if equal.tie else "")
    interval = NO_VALUE if equal.interval is None else f"{equal.interval.low:+.3f} to {equal.interval.high:+.3f}"
    ahead = f"{equal.seeds_ahead} of {equal.seeds_shared}" if equal.seeds_shared else NO_VALUE
    read = equal.read_a if equal.read_a == equal.read_b else f"{equal.read_a} / {equal.read_b}"
    return cost_with_unit(axis, equal.at), f"{equal.loss_a:.3f}", f"{equal.loss_b:.3f}", gain, interval, ahead, read


def _domain_table(comparison: Comparison, title: str, synthetic: bool) -> Table:
    """Losses by domain; synthetic domains have a table of their own, as their text is much easier."""
    variants = comparison.variants
    domains = sorted({domain for variant in variants for domain in variant.domains})
    paired = comparison.pair(comparison.challenger, variants[0].name).paired
    head = ("domain", *(variant.name for variant in variants))
    if paired is not None and paired.domains:
        head += (f"gain of {comparison.challenger}", "95% interval")
    rows = []
    for domain in domains:
        if domain.startswith(SYNTHETIC) == synthetic:
            losses = [variant.domains.get(domain) for variant in variants]
            cells = [NO_VALUE if loss is None else f"{loss['loss']:.3f}" for loss in losses]
            intervals = _gain_cells(paired.domains.get(domain)) if paired is not None and paired.domains else ()
            rows.append((domain, *cells, *intervals))
    return Table(title, head, tuple(rows))


def _seed_table(comparison: Comparison) -> Table:
    """The runs of each variant; no rows if each variant is a single run."""
    grouped = any(len(variant.all_runs) > 1 for variant in comparison.variants)
    rows = [
        (run.name, variant.name, str(run.config.seed), f"{run.config.train.steps:,}", f"{loss:.3f}", duration(seconds))
        for variant in comparison.variants
        for length in variant.lengths
        for run, loss, seconds in zip(length.runs, length.final_losses, length.final_seconds, strict=True)
        if grouped
    ]
    return Table("Runs", ("run", "variant", "seed", "steps", "val loss final", "time"), tuple(rows), left=2)


def _config_table(comparison: Comparison) -> Table:
    names = [variant.name for variant in comparison.variants]
    rows = [
        (key, *(NO_VALUE if values[name] is None else _as_text(values[name]) for name in names))
        for key, values in comparison.config_differences.items()
    ]
    return Table("Config differences", ("key", *names), tuple(rows), left=1 + len(names))


def _version_table(comparison: Comparison) -> Table:
    names = [variant.name for variant in comparison.variants]
    rows = tuple((key, *(_environment_values(variant, key) for variant in comparison.variants)) for key in ENVIRONMENT)
    return Table("Versions", ("", *names), rows, left=1 + len(names))


def _environment_values(variant: Variant, key: str) -> str:
    """The different values of a key of environment.json over a variant's runs."""
    values = [run.environment.get(key) for run in variant.runs]
    return ", ".join(dict.fromkeys(_as_text(value) for value in values if value is not None)) or NO_VALUE


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _main_pairs(comparison: Comparison) -> list[PairResult]:
    """All pairs of a few variants; of many, those with the reference."""
    reference = comparison.variants[0].name
    everything = len(comparison.variants) <= ALL_PAIRS_UP_TO
    return [pair for pair in comparison.pairs if everything or reference in (pair.a, pair.b)]


def _cost_and_ratio(axis: Axis, reached: CostToReach) -> str:
    if reached.cost is None:
        return "not reached"
    cost = format_cost(axis, reached.cost)
    ratio = "" if not reached.ratio else f" ({'≥ ' if reached.at_most else ''}{reached.ratio:.2f}×"
    if ratio and reached.ratio_low is not None and reached.ratio_high is not None:
        ratio += f", {reached.ratio_low:.2f} to {reached.ratio_high:.2f}"
    return f"{'≤ ' if reached.at_most else ''}{cost}{ratio and ratio + ')'}"


def _decided_by(interval: BootstrapInterval) -> str:
    """What would decide a difference of this size, if its interval does not."""
    if not interval.undecided:
        return "these runs" if interval.seeds_included else "these documents, for one seed"
    if interval.seeds_to_decide is not None:
        return f"{interval.seeds_to_decide} seeds"
    return f"more than {MAX_SEEDS:,} seeds" if interval.seeds_included else "more seeds"


def _gain_cells(interval: BootstrapInterval | None) -> tuple[str, str]:
    if interval is None:
        return NO_VALUE, NO_VALUE
    return f"{interval.gain:+.3f}", f"{interval.low:+.3f} to {interval.high:+.3f}"
