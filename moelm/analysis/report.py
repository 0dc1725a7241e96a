"""A comparison on disk and on the terminal: report.json, report.md, report.html and the pictures."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from moelm import __version__
from moelm.analysis.compare import Comparison, compare
from moelm.analysis.contestants import Contestant, gather
from moelm.analysis.intervals import Interval
from moelm.analysis.measures import Equal, Pair
from moelm.analysis.page import Picture, Report, markdown, page
from moelm.analysis.plots import draw_comparison, draw_load, draw_trend, in_both_lights
from moelm.analysis.runs import read_runs
from moelm.analysis.tables import paired_tables, reach_table, report_tables, runs_table
from moelm.errors import MoelmError

SCHEMA = 1
KIND = "moelm compare"
"""With the schema, how a directory is known as an earlier report."""
NAMED = 4
"""Contestants named in the title."""
FILES = ("report.json", "report.md", "report.html", "comparison.png", "trend.png", "load.png")


def compare_runs(
    paths: Sequence[str],
    out: Path,
    force: bool = False,
    grouped: bool = False,
    prices: Sequence[float] = (),
    command: str | None = None,
) -> Comparison:
    """Compare runs and write the report.

    Args:
        paths: run directories or names under `runs/`; the first is the reference, or of it.
        out: directory of the report; new, empty, or holding an earlier report, which is replaced.
        force: compare runs on different data all the same, with a warning in the report.
        grouped, prices: see `gather`.
        command: what was typed, for the report.
    Raises:
        MoelmError: unreadable or incomparable runs, or an `out` that is not to be overwritten.
    """
    check_out(out)
    comparison = compare(gather(read_runs(paths), grouped, prices), force)
    write_report(comparison, out, command)
    return comparison


def write_report(comparison: Comparison, out: Path, command: str | None = None) -> None:
    """Write the report's files beside `out`, then move them into its place.

    Raises:
        MoelmError: `out` holds something else than an earlier report, or cannot be written.
    """
    check_out(out)
    out = out.resolve()
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        _write_files(comparison, fresh, command)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except OSError as error:
        if old.exists():
            old.rename(out)
        raise MoelmError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def report_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values; losses in nats per token, times in seconds, memory in bytes.

    Keys stay what they are within one `schema`; what is not known or not reached is null.
    """
    verdict, trend = comparison.verdict, comparison.trend
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "moelm": __version__,
        "reference": comparison.contestants[0].name,
        "challenger": comparison.challenger,
        "winner": verdict.winner,
        "verdict": verdict.sentence,
        "sureness": verdict.sureness,
        "reach": verdict.reach,
        "basis": comparison.basis,
        "notes": list(comparison.notes),
        "forced": bool(comparison.warnings),
        "warnings": list(comparison.warnings),
        "runs": [_contestant_json(each) for each in comparison.contestants],
        "pairs": [_pair_json(pair) for pair in comparison.pairs],
        "trend": None
        if trend is None
        else {
            "of": trend.what,
            "values": dict(zip(trend.names, trend.values, strict=True)),
            "slope_per_doubling": trend.slope,
            "doubt": trend.doubt,
            "loss_at_1": trend.at_one,
        },
        "config_differences": {key: dict(values) for key, values in comparison.differences.items()},
    }


def render_table(console: Console, comparison: Comparison) -> None:
    """Print the runs, who reaches whose loss, and the verdict."""
    for warning in comparison.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
    for table in (runs_table(comparison).turned(), *paired_tables(comparison), reach_table(comparison)):
        rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, name in enumerate(table.head):
            rich.add_column(name, justify="left" if i < table.left else "right", overflow="fold")
        for row in table.rows:
            rich.add_row(*map(Text, row))
        console.print(rich)
    console.print(Text(comparison.verdict.sentence, style="bold"))
    for line in _further(comparison):
        console.print(Text(line))
    for note in comparison.notes:
        console.print(Text(f"Note: {note}", style="dim"))


def _further(comparison: Comparison) -> tuple[str, ...]:
    verdict = comparison.verdict
    trend = () if comparison.trend is None else (comparison.trend.sentence,)
    return (verdict.sureness, *trend, verdict.reach, comparison.basis)


def check_out(out: Path) -> None:
    """Refuse a directory that a report would not be alone in.

    Raises:
        MoelmError: it holds something else than an earlier report.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise MoelmError(f"{out} is a file; --out is the directory of the report.")
    there = sorted(path.name for path in out.iterdir())
    if there and not _is_report(out / "report.json"):
        raise MoelmError(f"{out} is not empty and holds no earlier report; choose another --out.")
    foreign = [name for name in there if name not in FILES]
    if foreign:
        raise MoelmError(f"{out} holds {foreign[0]} beside an earlier report; move it or choose another --out.")


def _is_report(path: Path) -> bool:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("kind") == KIND and isinstance(report.get("schema"), int)


def _write_files(comparison: Comparison, where: Path, command: str | None) -> None:
    pictures = _pictures(comparison)
    runs = [run for each in comparison.contestants for run in each.runs]
    trained = [str(run.environment["command"]) for run in runs if run.environment.get("command")]
    report = Report(
        title=_title([each.name for each in comparison.contestants]),
        warnings=comparison.warnings,
        answer=comparison.verdict.sentence,
        further=_further(comparison),
        notes=comparison.notes,
        pictures=pictures,
        tables=report_tables(comparison),
        commands=(*trained, *([command] if command else [])),
    )
    told = json.dumps(report_json(comparison), indent=2, ensure_ascii=False, allow_nan=False)
    texts = {"report.json": told + "\n", "report.md": markdown(report), "report.html": page(report)}
    for name, text in texts.items():
        (where / name).write_text(text, encoding="utf-8")
    for picture in pictures:
        (where / picture.name).write_bytes(picture.light)


def _pictures(comparison: Comparison) -> tuple[Picture, ...]:
    found = [
        Picture(
            "comparison.png",
            "Validation loss against what it cost",
            *in_both_lights(lambda: draw_comparison(comparison)),
        )
    ]
    if (trend := comparison.trend) is not None:
        found.append(Picture("trend.png", f"Final loss by {trend.noun}", *in_both_lights(lambda: draw_trend(trend))))
    loads = [(each.name, each.load) for each in comparison.contestants if each.load is not None]
    sparse = [(name, load) for name, load in loads if load.share.shape[-1] > 1]  # one expert has all there is
    if sparse:
        caption = "Load of the experts over time, and per expert and layer at the end"
        found.append(Picture("load.png", caption, *in_both_lights(lambda: draw_load(sparse))))
    return tuple(found)


def _title(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return " · ".join(names[:NAMED]) + more


def _equal_json(equal: Equal) -> dict[str, Any]:
    return {"at": equal.at, "a": equal.loss_a, "b": equal.loss_b, "gain": equal.gain, "tie": equal.tie}


def _interval_json(found: Interval) -> dict[str, Any]:
    return {
        "gain": found.gain,
        "low": found.low,
        "high": found.high,
        "documents": found.documents,
        "documents_effective": found.effective,
        "documents_better": found.better,
        "seeds": list(found.seeds),
        "seeds_scatter": found.scatter,
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "a": pair.a,
        "b": pair.b,
        "target_loss": pair.target,
        "needs": {axis: {"need": need.need, "total": need.total, "ratio": need.ratio} for axis, need in pair.needs.items()},
        "equal": {axis: equal and _equal_json(equal) for axis, equal in pair.equal.items()},
        "paired": pair.paired and _interval_json(pair.paired.whole),
        "domains": pair.paired and {name: _interval_json(found) for name, found in pair.paired.domains.items()},
    }


def _contestant_json(each: Contestant) -> dict[str, Any]:
    val = each.val
    return {
        "name": each.name,
        "path": str(each.runs[0].path),
        "members": [
            {"name": run.name, "path": str(run.path), "seed": run.config.seed, "val_loss": loss}
            for run, loss in zip(each.runs, each.final_losses.tolist(), strict=True)
        ],
        "parameters": each.parameters,
        "flops_per_token": each.flops_per_token,
        "tokens": val.tokens[-1],
        "flops": val.flops[-1],
        "seconds": val.seconds[-1],
        "dollars": None if each.price is None else each.cost("dollars")[-1],
        "val_loss": {"final": val.loss[-1], "best": val.loss.min(), "spread": each.spread},
        "val_bpb": {"final": val.bpb[-1], "best": val.bpb.min()},
        "tokens_per_second": each.tokens_per_second,
        "memory_peak_bytes": each.memory_peak,
        "domains": each.domains,
        "curve": {key: getattr(val, key).tolist() for key in ("steps", "tokens", "flops", "seconds", "loss", "bpb")},
        "load": each.load and {"layers": list(each.load.layers), "final_share": each.load.share[-1].tolist()},
        "environment": each.environment,
    }
