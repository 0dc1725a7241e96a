"""A comparison on disk and on the terminal: report.json, report.md, report.html and the pictures.

Everything shown as a table is built once, as words, and rendered three times.
"""

import base64
import html
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from moelm import __version__
from moelm.analysis.compare import AXES, AXIS_NAMES, Axis, Comparison, Equal, Need, amount, compare, quantity
from moelm.analysis.plots import plot_comparison, plot_load
from moelm.analysis.runs import SYNTHETIC, RunRecord, read_runs
from moelm.errors import MoelmError

SCHEMA = 1
KIND = "moelm compare"
"""With the schema, how a directory is known as an earlier report."""
FILES = ("report.json", "report.md", "report.html", "comparison.png", "load.png")
_NONE = "–"


@dataclass(frozen=True)
class Table:
    """A titled table of words."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    """Leading columns that hold text; the others hold numbers and are set to the right."""


def compare_runs(paths: Sequence[str], out: Path, force: bool = False) -> Comparison:
    """Compare runs and write the report.

    Args:
        paths: run directories or names under `runs/`; the first is the reference.
        out: directory of the report; new, empty, or holding an earlier report, which is replaced.
        force: compare runs on different data all the same, with a warning in the report.
    Raises:
        MoelmError: unreadable or incomparable runs, or an `out` that is not to be overwritten.
    """
    _check_out(out)
    comparison = compare(read_runs(paths), force)
    write_report(comparison, out)
    return comparison


def write_report(comparison: Comparison, out: Path) -> None:
    """Write the report's files beside `out`, then move them into its place.

    Raises:
        MoelmError: `out` holds something else than an earlier report, or cannot be written.
    """
    _check_out(out)
    out = out.resolve()
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        _write_files(comparison, fresh)
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
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "moelm": __version__,
        "reference": comparison.runs[0].name,
        "challenger": comparison.challenger,
        "winner": comparison.verdict.winner,
        "verdict": comparison.verdict.sentence,
        "reach": comparison.verdict.reach,
        "basis": comparison.basis,
        "notes": list(comparison.notes),
        "forced": bool(comparison.warnings),
        "warnings": list(comparison.warnings),
        "runs": [_run_json(run) for run in comparison.runs],
        "pairs": [
            {
                "a": pair.a,
                "b": pair.b,
                "target_loss": pair.target,
                "needs": {
                    axis: {"need": need.need, "total": need.total, "ratio": need.ratio} for axis, need in pair.needs.items()
                },
                "equal": {axis: equal and _equal_json(equal) for axis, equal in pair.equal.items()},
            }
            for pair in comparison.pairs
        ],
        "config_differences": {key: dict(values) for key, values in comparison.differences.items()},
    }


def render_table(console: Console, comparison: Comparison) -> None:
    """Print the runs, who reaches whose loss, and the verdict."""
    for warning in comparison.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
    for table in (_turned(_runs_table(comparison)), _reach_table(comparison)):
        rich = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, name in enumerate(table.head):
            rich.add_column(name, justify="left" if i < table.left else "right", overflow="fold")
        for row in table.rows:
            rich.add_row(*map(Text, row))
        console.print(rich)
    console.print(Text(comparison.verdict.sentence, style="bold"))
    for line in (comparison.verdict.reach, comparison.basis):
        console.print(Text(line))
    for note in comparison.notes:
        console.print(Text(f"Note: {note}", style="dim"))


def report_tables(comparison: Comparison) -> tuple[Table, ...]:
    """All tables of the report, in reading order."""
    tables = [_runs_table(comparison), _reach_table(comparison), _equal_table(comparison)]
    tables += _domain_tables(comparison.runs)
    names = tuple(run.name for run in comparison.runs)
    if comparison.differences:
        differences = comparison.differences.items()
        rows = tuple((key, *(_word(values[name]) for name in names)) for key, values in differences)
        tables.append(Table("Config differences", ("key", *names), rows, left=99))
    keys = ("moelm", "python", "torch", "platform", "device", "processes", "threads", "precision", "command", "started")
    rows = tuple((key, *(_word(run.environment.get(key)) for run in comparison.runs)) for key in keys)
    tables.append(Table("Versions", ("", *names), rows, left=99))
    return tuple(tables)


def _check_out(out: Path) -> None:
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


def _write_files(comparison: Comparison, where: Path) -> None:
    plot_comparison(comparison, where / "comparison.png")
    pictures = {"comparison.png": "Validation loss against tokens, FLOPs and wall-clock"}
    if plot_load(comparison.runs, where / "load.png"):
        pictures["load.png"] = "Load of the experts over time, and per expert and layer at the end"
    report = json.dumps(report_json(comparison), indent=2, ensure_ascii=False, allow_nan=False)
    tables = report_tables(comparison)
    texts = {
        "report.json": report + "\n",
        "report.md": _markdown(comparison, tables, pictures),
        "report.html": _page(comparison, tables, pictures, where),
    }
    for name, text in texts.items():
        (where / name).write_text(text, encoding="utf-8")


def _equal_json(equal: Equal) -> dict[str, Any]:
    return {"at": equal.at, "a": equal.loss_a, "b": equal.loss_b, "gain": equal.gain, "tie": equal.tie}


def _run_json(run: RunRecord) -> dict[str, Any]:
    val = run.val
    return {
        "name": run.name,
        "path": str(run.path),
        "parameters": run.parameters,
        "flops_per_token": run.flops_per_token,
        "tokens": val.tokens[-1],
        "flops": val.flops[-1],
        "seconds": val.seconds[-1],
        "val_loss": {"final": val.loss[-1], "best": val.loss.min()},
        "val_bpb": {"final": val.bpb[-1], "best": val.bpb.min()},
        "tokens_per_second": run.tokens_per_second,
        "memory_peak_bytes": run.memory_peak,
        "domains": run.domains,
        "curve": {key: getattr(val, key).tolist() for key in ("steps", "tokens", "flops", "seconds", "loss", "bpb")},
        "load": run.load and {"layers": list(run.load.layers), "final_share": run.load.share[-1].tolist()},
        "environment": run.environment,
    }


def _runs_table(comparison: Comparison) -> Table:
    sizes = ("params total", "params active", "FLOPs/token", "tokens")
    losses = ("val loss final", "val loss best", "bpb final", "bpb best")
    rows = []
    for run in comparison.runs:
        rate, memory = run.tokens_per_second, run.memory_peak
        rows.append(
            (
                run.name,
                quantity(run.parameters["total"]),
                quantity(run.parameters["active"]),
                quantity(run.flops_per_token),
                quantity(run.val.tokens[-1]),
                *(f"{x:.3f}" for curve in (run.val.loss, run.val.bpb) for x in (curve[-1], curve.min())),
                quantity(rate) if rate else _NONE,
                f"{memory / 2**30:.2f} GiB" if memory else _NONE,
            )
        )
    return Table("Runs", ("run", *sizes, *losses, "tokens/s", "peak memory"), tuple(rows))


def _turned(table: Table) -> Table:
    """Runs become columns, for few terminals are as wide as the table of runs."""
    head, *rows = zip(table.head, *table.rows, strict=True)
    return Table(table.title, ("", *head[1:]), tuple(rows))


def _reach_table(comparison: Comparison) -> Table:
    rows = tuple(
        (pair.a, f"{pair.b} at {pair.target:.3f}", *(_need(axis, pair.needs[axis]) for axis in AXES))
        for pair in comparison.pairs
    )
    head = ("run", "reaches", "tokens", "FLOPs", "time")
    return Table("What a run needs to reach another's final loss", head, rows, left=2)


def _need(axis: Axis, need: Need) -> str:
    if need.need is None:
        return "not reached"
    words = amount(axis, need.need).removesuffix(" tokens").removesuffix(" FLOPs")
    return f"{words} ({need.ratio:.2f}×)" if need.ratio else words


def _equal_table(comparison: Comparison) -> Table:
    """Each pair once, told from its later run, so that a gain is a gain on the reference."""
    place = {run.name: i for i, run in enumerate(comparison.runs)}
    rows = []
    for pair in comparison.pairs:
        if place[pair.a] < place[pair.b]:
            continue
        for axis in AXES:
            equal = pair.equal[axis]
            cells = (_NONE,) * 4
            if equal:
                gain = "tie" if equal.tie else f"{equal.gain:+.3f}"
                cells = (amount(axis, equal.at), f"{equal.loss_a:.3f}", f"{equal.loss_b:.3f}", gain)
            rows.append((f"{pair.a} against {pair.b}", f"equal {AXIS_NAMES[axis]}", *cells))
    head = ("runs", "at", "cost", "loss", "the other's", "gain in nats")
    return Table("Validation loss at equal cost", head, tuple(rows), left=2)


def _domain_tables(runs: Sequence[RunRecord]) -> Iterator[Table]:
    """Real and synthetic text apart, for the generator's text is far easier than people's."""
    domains = sorted({domain for run in runs for domain in run.domains})
    for title, wanted in (("Final loss by domain", False), ("Final loss by synthetic domain", True)):
        rows = tuple(
            (
                domain,
                *(f"{run.domains[domain]['loss']:.3f}" if domain in run.domains else _NONE for run in runs),
            )
            for domain in domains
            if domain.startswith(SYNTHETIC) == wanted
        )
        if rows:
            yield Table(title, ("domain", *(run.name for run in runs)), rows)


def _word(value: Any) -> str:
    return _NONE if value is None else value if isinstance(value, str) else json.dumps(value)


def _markdown(comparison: Comparison, tables: Sequence[Table], pictures: Mapping[str, str]) -> str:
    parts = [f"# {_title(comparison)}", *(f"> **Warning:** {text}" for text in comparison.warnings)]
    parts += [f"**{comparison.verdict.sentence}**", comparison.verdict.reach, comparison.basis]
    parts += ["\n".join(f"- {note}" for note in comparison.notes)] if comparison.notes else []
    parts += [f"![{caption}]({name})" for name, caption in pictures.items()]
    for table in tables:
        rule = ("---" if i < table.left else "---:" for i in range(len(table.head)))
        cells = ((cell.replace("|", "\\|") for cell in row) for row in (table.head, rule, *table.rows))
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
    return "\n\n".join(parts) + "\n"


def _page(comparison: Comparison, tables: Sequence[Table], pictures: Mapping[str, str], where: Path) -> str:
    """One file without links to others: pictures are data URIs, the style is inline."""
    say = html.escape
    body = [f"<h1>{say(_title(comparison))}</h1>"]
    body += [f'<p class="warning">Warning: {say(text)}</p>' for text in comparison.warnings]
    body += [f'<p class="verdict">{say(comparison.verdict.sentence)}</p>']
    body += [f"<p>{say(text)}</p>" for text in (comparison.verdict.reach, comparison.basis)]
    if comparison.notes:
        body += ["<ul>", *(f"<li>{say(note)}</li>" for note in comparison.notes), "</ul>"]
    for name, caption in pictures.items():
        data = base64.b64encode((where / name).read_bytes()).decode("ascii")
        body += [f'<figure><img alt="{say(caption)}" src="data:image/png;base64,{data}"></figure>']
    for table in tables:
        head, *rows = (
            "".join(_cell(tag, cell, left=i < table.left) for i, cell in enumerate(row))
            for tag, row in [("th", table.head), *(("td", row) for row in table.rows)]
        )
        body += [
            f"<h2>{say(table.title)}</h2>",
            '<div class="table"><table>',
            f"<thead><tr>{head}</tr></thead>",
        ]
        body += ["<tbody>", *(f"<tr>{row}</tr>" for row in rows), "</tbody></table></div>"]
    title = say(_title(comparison))
    return _PAGE.format(title=title, style=_CSS, body="\n".join(body), version=__version__)


def _title(comparison: Comparison) -> str:
    return " · ".join(run.name for run in comparison.runs)


def _cell(tag: str, text: str, left: bool) -> str:
    return f"<{tag}{'' if left else ' class=n'}>{html.escape(text)}</{tag}>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<footer>Written by moelm {version}. Losses in nats per token.</footer>
</body>
</html>
"""
_CSS = """
:root { --paper: #fff; --ink: #1f2933; --quiet: #616e7c; --line: #e4e7eb; --warn: #fff4d6; --alarm: #7a4b00 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15191e; --ink: #e4e7eb; --quiet: #9aa5b1; --line: #323f4b; --warn: #3d2f0c; --alarm: #ffd97a } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { margin: 0 0 1rem; font-size: 1.1rem; font-weight: 600; color: var(--quiet); overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .5rem; font-size: 1.05rem }
.verdict { margin: 0 0 1rem; font-size: 1.4rem; line-height: 1.35; font-weight: 600; text-wrap: pretty }
.warning { padding: .6rem .9rem; border-radius: .4rem; background: var(--warn); color: var(--alarm) }
ul { padding-left: 1.2rem; color: var(--quiet) }
figure { margin: 1.5rem 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem;
  background: #fff }
img { display: block; width: 100%; height: auto }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: bottom }
th { font-weight: 500; color: var(--quiet) }
td { white-space: nowrap }
.n { padding: .35rem 0 .35rem .8rem; text-align: right }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--quiet) }
"""
