"""The report of a comparison on disk: report.json, report.md, report.html and the figures."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from moelm import __version__
from moelm.compare.comparison import Comparison, compare
from moelm.compare.figures import draw_comparison, draw_expert_load, draw_scaling
from moelm.compare.pairwise import PairResult
from moelm.compare.seed_std import read_seed_std
from moelm.compare.tables import report_tables
from moelm.compare.variants import Variant, group_runs
from moelm.report.directory import check_report_directory, write_report_directory
from moelm.report.figures import render_light_and_dark
from moelm.report.page import Report, ReportFigure
from moelm.runs.record import read_runs

SCHEMA = 3
KIND = "moelm compare"
TITLE_NAMES = 4
"""Number of variants named in the title."""


def compare_runs(
    paths: Sequence[str],
    out: Path,
    force: bool = False,
    grouped: bool = False,
    prices: Sequence[float] = (),
    command: str | None = None,
    seed_std: Path | None = None,
) -> Comparison:
    """Compare runs and write the report.

    Args:
        paths: run directories or names under `runs/`; the first is the reference or belongs to it.
        out: directory of the report; new, empty, or with an earlier report, which is replaced.
        force: whether to compare runs on different data, with a warning in the report.
        grouped, prices: see `group_runs`.
        command: the command line, for the report.
        seed_std: a report.json, see `read_seed_std`.

    Raises:
        MoelmError: runs that cannot be read or compared, or an `out` that must not be replaced.
    """
    check_report_directory(out)
    variants = group_runs(read_runs(paths), grouped, prices)
    comparison = compare(variants, force, None if seed_std is None else read_seed_std(seed_std, variants))
    write_report(comparison, out, command)
    return comparison


def write_report(comparison: Comparison, out: Path, command: str | None = None) -> None:
    """Write the report.

    Raises:
        MoelmError: see `write_report_directory`.
    """
    report = Report(
        title=_title([variant.name for variant in comparison.variants]),
        warnings=comparison.warnings,
        answer=comparison.verdict.sentence,
        details=summary_sentences(comparison),
        notes=comparison.notes,
        figures=_figures(comparison),
        tables=report_tables(comparison),
        commands=commands_of(comparison.variants, command),
    )
    write_report_directory(out, report, report_json(comparison))


def commands_of(variants: Sequence[Variant], command: str | None) -> tuple[str, ...]:
    """The command lines that made the runs, and then that of the report if known."""
    recorded = [run.environment.get("command") for variant in variants for run in variant.all_runs]
    return tuple(str(each) for each in (*recorded, command) if each)


def report_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values: losses in nats per token, times in seconds, memory in bytes.

    Keys do not change within one `schema`; what is unknown or not reached is null.
    """
    verdict = comparison.verdict
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "moelm": __version__,
        "reference": comparison.variants[0].name,
        "challenger": comparison.challenger,
        "winner": verdict.winner,
        "verdict": verdict.sentence,
        "confidence": verdict.confidence,
        "efficiency": verdict.efficiency,
        "sizes": verdict.sizes,
        "notes": list(comparison.notes),
        "forced": comparison.forced,
        "warnings": list(comparison.warnings),
        "variants": [_variant_json(variant) for variant in comparison.variants],
        "pairs": [_pair_json(pair) for pair in comparison.pairs],
        "seed_std": comparison.seed_std and {"std": comparison.seed_std.std, "degrees": comparison.seed_std.degrees},
        "scaling": comparison.scaling and asdict(comparison.scaling),
        "config_differences": {key: dict(values) for key, values in comparison.config_differences.items()},
    }


def summary_sentences(comparison: Comparison) -> tuple[str, ...]:
    """The sentences that follow the verdict."""
    verdict = comparison.verdict
    scaling = () if comparison.scaling is None else (comparison.scaling.sentence,)
    return (verdict.confidence, *scaling, verdict.efficiency, verdict.sizes)


def _figures(comparison: Comparison) -> tuple[ReportFigure, ...]:
    draws = [("comparison.png", "Validation loss against cost", partial(draw_comparison, comparison))]
    if (fit := comparison.scaling) is not None:
        draws.append(("scaling.png", f"Final loss by {fit.description}", partial(draw_scaling, fit)))
    loads = [(variant.name, load) for variant in comparison.variants if (load := variant.first.load) is not None]
    loads = [(name, load) for name, load in loads if load.share.shape[-1] > 1]  # a single expert always has all tokens
    if loads:
        caption = "Load of the experts over time, and by expert and layer at the end"
        draws.append(("load.png", caption, partial(draw_expert_load, loads)))
    return tuple(ReportFigure(name, caption, *render_light_and_dark(draw)) for name, caption, draw in draws)


def _title(names: Sequence[str]) -> str:
    more = f" and {len(names) - TITLE_NAMES} more" if len(names) > TITLE_NAMES else ""
    return " · ".join(names[:TITLE_NAMES]) + more


def _variant_json(variant: Variant) -> dict[str, Any]:
    val, first = variant.val, variant.first
    return {
        "name": variant.name,
        "path": str(first.path),
        "runs": _runs_json(variant),
        "lengths": [_length_json(length) for length in variant.lengths],
        "parameters": first.parameters,
        "flops_per_token": first.flops_per_token,
        "tokens": val.tokens[-1],
        "flops": val.flops[-1],
        "seconds": val.seconds[-1],
        "dollars": None if variant.price is None else variant.cost("dollars")[-1],
        "val_loss": {"final": val.loss[-1], "best": val.loss.min(), "seed_std": variant.seed_std},
        "val_bpb": {"final": val.bpb[-1], "best": val.bpb.min()},
        "tokens_per_second": variant.tokens_per_second,
        "memory_peak_bytes": variant.memory_peak,
        "domains": variant.domains,
        "curve": {key: getattr(val, key).tolist() for key in ("steps", "tokens", "flops", "seconds", "loss", "bpb")},
        "load": first.load and {"layers": list(first.load.layers), "final_share": first.load.share[-1].tolist()},
        "environment": first.environment,
    }


def _runs_json(variant: Variant) -> list[dict[str, Any]]:
    return [
        {"name": run.name, "path": str(run.path), "seed": run.config.seed, "val_loss": loss}
        for run, loss in zip(variant.runs, variant.final_losses.tolist(), strict=True)
    ]


def _length_json(length: Variant) -> dict[str, Any]:
    val = length.val
    costs = {"tokens": val.tokens[-1], "flops": val.flops[-1], "seconds": val.seconds[-1]}
    return {"steps": length.first.config.train.steps, **costs, "val_loss": val.loss[-1], "runs": _runs_json(length)}


def _pair_json(pair: PairResult) -> dict[str, Any]:
    paired = pair.paired
    return {
        "a": pair.a,
        "b": pair.b,
        "target_loss": pair.target_loss,
        "cost_to_reach": {axis: asdict(cost) | {"ratio": cost.ratio} for axis, cost in pair.cost_to_reach.items()},
        "equal_cost": {
            axis: equal and asdict(equal) | {"gain": equal.gain, "tie": equal.tie}
            for axis, equal in pair.equal_cost.items()
        },
        "paired": paired and asdict(paired.overall),
        "domains": paired and {name: asdict(interval) for name, interval in paired.domains.items()},
    }
