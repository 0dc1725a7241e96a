"""Everything that a comparison shows as a table, as words: built once, for the terminal, Markdown and HTML."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moelm.analysis.compare import Comparison
from moelm.analysis.contestants import AXIS_NAMES, Axis, Contestant
from moelm.analysis.measures import Need, Pair
from moelm.analysis.runs import SYNTHETIC
from moelm.analysis.verdict import interval_words
from moelm.analysis.words import dollars, duration, exponent, quantity

NONE = "–"
FEW = 3
"""Contestants up to which each is measured against each other; more are measured against the reference."""


@dataclass(frozen=True)
class Table:
    """A titled table of words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    """Leading columns that hold text; the others hold numbers and are set to the right."""

    def turned(self) -> "Table":
        """Rows become columns, for few terminals are as wide as the table of runs."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return Table(self.title, ("", *head[1:]), tuple(rows))


def report_tables(comparison: Comparison) -> tuple[Table, ...]:
    """All tables of the report, in reading order."""
    tables = [runs_table(comparison), *paired_tables(comparison), *trend_tables(comparison)]
    tables += [reach_table(comparison), equal_table(comparison), *_domain_tables(comparison)]
    tables += _member_tables(comparison)
    names = tuple(each.name for each in comparison.contestants)
    if comparison.differences:
        differences = comparison.differences.items()
        rows = tuple((key, *(_word(values[name]) for name in names)) for key, values in differences)
        tables.append(Table("Config differences", ("key", *names), rows, left=99))
    keys = ("moelm", "python", "torch", "platform", "device", "processes", "threads", "precision", "started")
    rows = tuple((key, *(each.told(key) for each in comparison.contestants)) for key in keys)
    tables.append(Table("Versions", ("", *names), rows, left=99))
    return tuple(tables)


def runs_table(comparison: Comparison) -> Table:
    """Sizes, losses and speed."""
    sizes = ("params total", "params active", "FLOPs/token", "tokens")
    losses = ("val loss final", "val loss best", "bpb final", "bpb best")
    grouped = any(len(each.runs) > 1 for each in comparison.contestants)
    rows = []
    for each in comparison.contestants:
        rate, memory, spread = each.tokens_per_second, each.memory_peak, each.spread
        figures = [f"{x:.3f}" for curve in (each.val.loss, each.val.bpb) for x in (curve[-1], curve.min())]
        if spread is not None:
            figures[0] += f" ± {spread:.3f}"
        rows.append(
            (
                each.name,
                *([str(len(each.runs))] if grouped else []),
                quantity(each.parameters["total"]),
                quantity(each.parameters["active"]),
                quantity(each.flops_per_token),
                quantity(each.val.tokens[-1]),
                *figures,
                quantity(rate) if rate else NONE,
                f"{memory / 2**30:.2f} GiB" if memory else NONE,
            )
        )
    title = "Contestants (means over seeds ± standard deviation)" if grouped else "Runs"
    head = ("run", *(["seeds"] if grouped else []), *sizes, *losses, "tokens/s", "peak memory")
    return Table(title, head, tuple(rows))


def paired_tables(comparison: Comparison) -> Iterator[Table]:
    """Each contestant against the reference on the same documents."""
    rows = []
    for pair in _against_reference(comparison):
        if pair.paired is not None:
            whole = pair.paired.whole
            rows.append((pair.a, f"{whole.gain:+.3f}", interval_words(whole), f"{whole.better:.0%}"))
    if rows:
        reference = comparison.contestants[0].name
        head = ("run", "gain in nats", "95% interval", "documents it predicts better")
        yield Table(f"At the end, against {reference} on the same documents", head, tuple(rows))


def trend_tables(comparison: Comparison) -> Iterator[Table]:
    """Final losses by the one setting in which the experts differ."""
    trend = comparison.trend
    if trend is None:
        return
    rows = tuple(
        (name, f"{value:g}", f"{sum(losses) / len(losses):.3f}", ", ".join(f"{loss:.3f}" for loss in losses))
        for name, value, losses in zip(trend.names, trend.values, trend.losses, strict=True)
    )
    yield Table(f"Loss by {trend.noun}", ("run", trend.what.replace("_", "-"), "final loss", "of each seed"), rows)


def reach_table(comparison: Comparison) -> Table:
    """Who needs how much to reach whose final loss."""
    rows = tuple(
        (pair.a, f"{pair.b} at {pair.target:.3f}", *(_need(axis, pair.needs[axis]) for axis in comparison.axes))
        for pair in _shown(comparison)
    )
    costs = ["time" if axis == "seconds" else AXIS_NAMES[axis] for axis in comparison.axes]
    return Table("What a run needs to reach another's final loss", ("run", "reaches", *costs), rows, left=2)


def equal_table(comparison: Comparison) -> Table:
    """Each pair once, told from its later contestant, so that a gain is a gain on the reference."""
    place = {each.name: i for i, each in enumerate(comparison.contestants)}
    rows = []
    for pair in _shown(comparison):
        if place[pair.a] < place[pair.b]:
            continue
        for axis in comparison.axes:
            equal = pair.equal[axis]
            cells = (NONE,) * 4
            if equal:
                gain = "tie" if equal.level else f"{equal.gain:+.3f}" + (" unsure" if equal.tie else "")
                cells = (amount(axis, equal.at), f"{equal.loss_a:.3f}", f"{equal.loss_b:.3f}", gain)
            rows.append((f"{pair.a} against {pair.b}", f"equal {AXIS_NAMES[axis]}", *cells))
    head = ("runs", "at", "cost", "loss", "the other's", "gain in nats")
    return Table("Validation loss at equal cost", head, tuple(rows), left=2)


def amount(axis: Axis, x: float) -> str:
    """A cost with its unit: `4.9M tokens`, `1.2e15 FLOPs`, `8.5 min`, `$0.31`."""
    if axis == "tokens":
        return f"{quantity(x)} tokens"
    if axis == "dollars":
        return dollars(x)
    return f"{exponent(x)} FLOPs" if axis == "flops" else duration(x)


def _shown(comparison: Comparison) -> list[Pair]:
    """All pairs of few contestants; of many, those with the reference."""
    if len(comparison.contestants) <= FEW:
        return list(comparison.pairs)
    reference = comparison.contestants[0].name
    return [pair for pair in comparison.pairs if reference in (pair.a, pair.b)]


def _against_reference(comparison: Comparison) -> list[Pair]:
    reference = comparison.contestants[0].name
    return [pair for pair in comparison.pairs if pair.b == reference]


def _need(axis: Axis, need: Need) -> str:
    if need.need is None:
        return "not reached"
    words = amount(axis, need.need).removesuffix(" tokens").removesuffix(" FLOPs")
    return f"{words} ({need.ratio:.2f}×)" if need.ratio else words


def _domain_tables(comparison: Comparison) -> Iterator[Table]:
    """Real and synthetic text apart, for the generator's text is far easier than people's."""
    contestants = comparison.contestants
    domains = sorted({domain for each in contestants for domain in each.domains})
    both = comparison.pair(comparison.challenger, contestants[0].name).paired
    gains = both.domains if both is not None else {}
    head = ("domain", *(each.name for each in contestants))
    if gains:
        head += (f"gain of {comparison.challenger}", "95% interval")
    for title, wanted in (("Final loss by domain", False), ("Final loss by synthetic domain", True)):
        rows = []
        for domain in domains:
            if domain.startswith(SYNTHETIC) != wanted:
                continue
            row = [domain, *(_domain_loss(each, domain) for each in contestants)]
            if gains:
                found = gains.get(domain)
                row += [NONE, NONE] if found is None else [f"{found.gain:+.3f}", interval_words(found)]
            rows.append(tuple(row))
        if rows:
            yield Table(title, head, tuple(rows))


def _domain_loss(contestant: Contestant, domain: str) -> str:
    return f"{contestant.domains[domain]['loss']:.3f}" if domain in contestant.domains else NONE


def _member_tables(comparison: Comparison) -> Iterator[Table]:
    """The runs behind the means."""
    if all(len(each.runs) == 1 for each in comparison.contestants):
        return
    rows = [
        (run.name, each.name, str(run.config.seed), f"{loss:.3f}", duration(seconds))
        for each in comparison.contestants
        for run, loss, seconds in zip(each.runs, each.final_losses, each.seconds, strict=True)
    ]
    yield Table("Runs", ("run", "of", "seed", "val loss final", "time"), tuple(rows), left=2)


def _word(value: Any) -> str:
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value)
