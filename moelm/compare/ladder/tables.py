"""The tables of a ladder as text."""

import math

from moelm.compare.axes import format_cost
from moelm.compare.bootstrap import CONFIDENCE
from moelm.compare.ladder.comparison import AxisResult, LadderComparison, axis_title
from moelm.compare.ladder.multiplier import Multiplier
from moelm.formats import duration, quantity
from moelm.report.table import NO_VALUE, Table


def ladder_tables(comparison: LadderComparison) -> tuple[Table, ...]:
    """All tables of the report, in reading order; tables without rows are left out."""
    tables = (
        points_table(comparison),
        multiplier_table(comparison, fitted=True),
        _frontier_table(comparison),
        _fit_table(comparison),
        _runs_table(comparison),
    )
    return tuple(table for table in tables if table.rows)


def points_table(comparison: LadderComparison) -> Table:
    """Each variant in each size: parameters, cost and loss."""
    axes = [result.axis for result in comparison.results]
    rows = []
    for side in comparison.ladder.sides:
        for size, variant in side.sizes.items():
            first, loss = variant.first, f"{variant.val.loss[-1]:.3f}"
            if variant.seed_std is not None:
                loss += f" ± {variant.seed_std:.3f}"
            rows.append(
                (
                    side.name,
                    size,
                    str(len(variant.runs)),
                    quantity(first.parameters["active"]),
                    quantity(first.parameters["total"]),
                    *(format_cost(axis, float(variant.cost(axis)[-1])) for axis in axes),
                    loss,
                )
            )
    head = ("variant", "size", "seeds", "active", "total", *map(axis_title, axes), "final loss")
    return Table("Sizes (means over seeds ± standard deviation)", head, tuple(rows), left=2)


def multiplier_table(comparison: LadderComparison, fitted: bool = False) -> Table:
    """The multiplier of each side in each size, on each axis.

    Args:
        fitted: whether the multiplier in FLOPs by the fits is beside it.
    """
    reference, *others = comparison.ladder.sides
    rows = []
    for i, side in enumerate(others):
        for j, size in enumerate(side.sizes):
            cells = (_cell(result.multipliers[i][j]) for result in comparison.results)
            rows.append((side.name, size, *cells, *([_fitted(comparison.results[0], i + 1, j)] if fitted else [])))
        means = (_cell(result.means[i]) for result in comparison.results)
        rows.append((side.name, "mean", *means, *([NO_VALUE] if fitted else [])))
    axes = (axis_title(result.axis) for result in comparison.results)
    head = ("variant", "size", *axes, *(["FLOPs, by the fits"] if fitted else []))
    title = f"Cost at which {reference.name} has the same loss, over the variant's own ({CONFIDENCE:.0%} intervals"
    return Table(f"{title}; * extrapolated)", head, tuple(rows), left=2)


def _frontier_table(comparison: LadderComparison) -> Table:
    """The points that no other is both cheaper and better than, by axis, the cheapest first."""
    rows = [
        (axis_title(result.axis), ", ".join(f"{side} {size}" for side, size in result.frontier))
        for result in comparison.results
    ]
    return Table("Best loss for the cost, the cheapest first", ("cost", "on the frontier"), tuple(rows), left=2)


def _cell(multiplier: Multiplier) -> str:
    low, high = ("?" if bound is None else f"{bound:.2f}" for bound in (multiplier.low, multiplier.high))
    if multiplier.value is None:
        return f"out of range ({low} to {high})" if multiplier.low or multiplier.high else "out of range"
    mark = "" if multiplier.read == "measured range" else "*"
    return f"{multiplier.value:.2f} ({low} to {high}){mark}"


def _fitted(result: AxisResult, side: int, size: int) -> str:
    if result.fit is None:
        return NO_VALUE
    cost = math.exp(result.points[side].costs_P[size])
    if (found := result.fit.multiplier(side, cost)) is None:
        return NO_VALUE
    value, low, high = found
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _fit_table(comparison: LadderComparison) -> Table:
    """The parameters of the fits."""
    rows = []
    for result in comparison.results:
        if (fit := result.fit) is None:
            continue
        floor = f"{fit.floor:.3f} ({fit.floor_low:.3f} to {fit.floor_high:.3f})"
        for side, law in zip(comparison.ladder.sides, fit.laws, strict=True):
            rows.append(
                (
                    side.name,
                    axis_title(result.axis),
                    f"{law.exponent:.3f} ({law.exponent_low:.3f} to {law.exponent_high:.3f})",
                    f"{law.scale:.4g}",
                    floor if fit.floor_identified else "not identified",
                    f"{max(map(abs, law.residuals)):.2%}",
                )
            )
    head = ("variant", "C", "a", "A", "E (shared)", "largest residual")
    return Table(f"Fits L(C) = E + A C^-a ({CONFIDENCE:.0%} intervals)", head, tuple(rows), left=2)


def _runs_table(comparison: LadderComparison) -> Table:
    """Every run, with what the rules of a ladder determine."""
    rows = [
        (
            run.name,
            str(run.config.seed),
            f"{run.config.optim.lr:g}",
            f"{run.config.train.batch_tokens:,}",
            f"{run.config.train.steps:,}",
            f"{loss:.4f}",
            duration(seconds),
        )
        for variant in comparison.ladder.variants
        for run, loss, seconds in zip(variant.runs, variant.final_losses, variant.final_seconds, strict=True)
    ]
    return Table("Runs", ("run", "seed", "lr", "batch", "steps", "final loss", "time"), tuple(rows))
