"""The report of a ladder on disk: report.json, report.md, report.html and the figures."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from moelm import __version__
from moelm.compare.ladder.comparison import AxisResult, LadderComparison
from moelm.compare.ladder.figures import draw_ladder, draw_multipliers
from moelm.compare.ladder.tables import ladder_tables
from moelm.compare.report import commands_of
from moelm.formats import join_names
from moelm.report.directory import write_report_directory
from moelm.report.figures import render_light_and_dark
from moelm.report.page import Report, ReportFigure

SCHEMA = 1
KIND = "moelm ladder"


def write_ladder_report(comparison: LadderComparison, out: Path, command: str | None = None) -> None:
    """Write the report.

    Raises:
        MoelmError: see `write_report_directory`.
    """
    draws = [
        ("ladder.png", "Final loss of each size against its cost", partial(draw_ladder, comparison)),
        ("multiplier.png", "The multiplier against the cost of a run", partial(draw_multipliers, comparison)),
    ]
    report = Report(
        title=f"{join_names([side.name for side in comparison.ladder.sides])} in several sizes",
        warnings=comparison.warnings,
        answer=comparison.answer,
        details=comparison.details,
        notes=comparison.notes,
        figures=tuple(ReportFigure(name, caption, *render_light_and_dark(draw)) for name, caption, draw in draws),
        tables=ladder_tables(comparison),
        commands=commands_of(comparison.ladder.variants, command),
    )
    write_report_directory(out, report, ladder_json(comparison))


def ladder_json(comparison: LadderComparison) -> dict[str, Any]:
    """The ladder as JSON values: losses in nats per token, times in seconds; what is unknown is null."""
    ladder = comparison.ladder
    seed_std = ladder.seed_std
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "moelm": __version__,
        "reference": ladder.sides[0].name,
        "answer": comparison.answer,
        "details": list(comparison.details),
        "notes": list(comparison.notes),
        "warnings": list(comparison.warnings),
        "log_loss_seed_std": seed_std and {"std": seed_std.std, "degrees": seed_std.degrees},
        "variants": [
            {
                "name": side.name,
                "sizes": [
                    {
                        "size": size,
                        "parameters": variant.first.parameters,
                        "flops": float(variant.cost("flops")[-1]),
                        "tokens": float(variant.cost("tokens")[-1]),
                        "seconds": float(variant.cost("seconds")[-1]),
                        "val_loss": float(variant.val.loss[-1]),
                        "val_bpb": float(variant.val.bpb[-1]),
                        "runs": [
                            {"name": run.name, "path": str(run.path), "seed": run.config.seed, "val_loss": loss}
                            for run, loss in zip(variant.runs, variant.final_losses.tolist(), strict=True)
                        ],
                    }
                    for size, variant in side.sizes.items()
                ],
            }
            for side in ladder.sides
        ],
        "axes": {result.axis: _axis_json(comparison, result) for result in comparison.results},
    }


def _axis_json(comparison: LadderComparison, result: AxisResult) -> dict[str, Any]:
    sides = comparison.ladder.sides
    return {
        "multipliers": {
            side.name: {
                "mean": asdict(mean),
                "sizes": {size: asdict(found) for size, found in zip(side.sizes, each, strict=True)},
            }
            for side, each, mean in zip(sides[1:], result.multipliers, result.means, strict=True)
        },
        "frontier": [{"variant": side, "size": size} for side, size in result.frontier],
        "fit": _fit_json(comparison, result),
    }


def _fit_json(comparison: LadderComparison, result: AxisResult) -> dict[str, Any] | None:
    if (fit := result.fit) is None:
        return None
    return {
        "floor": fit.floor,
        "floor_low": fit.floor_low,
        "floor_high": fit.floor_high,
        "floor_identified": fit.floor_identified,
        "variants": {side.name: asdict(law) for side, law in zip(comparison.ladder.sides, fit.laws, strict=True)},
    }
