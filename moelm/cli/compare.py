"""`moelm compare`, and the printed comparison with which `moelm sweep` ends."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelm.cli.options import AsJson, PlainConsole, finite_each, print_json
from moelm.console import printable

if TYPE_CHECKING:
    from moelm.compare.comparison import Comparison
    from moelm.compare.ladder.comparison import LadderComparison
    from moelm.report.table import Table as ReportTable


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="The first is the reference.")],
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("reports/compare"),
    group: Annotated[
        bool,
        typer.Option(
            "--group", help="Average runs that differ only in their seed, and join those that differ in train.steps."
        ),
    ] = False,
    price: Annotated[
        list[float] | None,
        typer.Option(
            min=0, callback=finite_each, help="Dollars per process and hour: once for all, or once for each variant."
        ),
    ] = None,
    seed_std: Annotated[
        Path | None,
        typer.Option(
            "--seed-std",
            metavar="REPORT",
            help="The report.json of the same models over several seeds, whose variation between seeds is used for runs "
            "of one seed.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare runs on different data, with a warning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs and write a report. The comparison is at equal tokens, FLOPs and seconds, with confidence intervals."""
    from moelm.compare.report import compare_runs

    comparison = compare_runs(runs, out, force, group, price or (), command_line(), seed_std)
    print_comparison(comparison, out, as_json)


def print_comparison(comparison: "Comparison", out: Path, as_json: bool) -> None:
    """Print a comparison whose report is in `out`."""
    from moelm.compare.report import report_json

    if as_json:
        print_json(report_json(comparison))
        return
    console = PlainConsole()
    render_comparison(console, comparison)
    console.print(f"\nReport: {out / 'report.html'}", soft_wrap=True)


def render_comparison(console: Console, comparison: "Comparison") -> None:
    """Print the main tables, the verdict and the notes."""
    from moelm.compare.report import summary_sentences
    from moelm.compare.tables import paired_table, reach_table, runs_table

    # Transposed, the table of runs fits on narrow terminals.
    tables = (runs_table(comparison).transpose(), paired_table(comparison), reach_table(comparison))
    answer, details = comparison.verdict.sentence, summary_sentences(comparison)
    _render(console, comparison.warnings, tables, answer, details, comparison.notes)


def print_ladder(ladder: "LadderComparison", out: Path) -> None:
    """Print a ladder whose report is in `out`: its main tables, sentences and notes."""
    from moelm.compare.ladder.tables import multiplier_table, points_table

    console = PlainConsole()
    tables = (points_table(ladder), multiplier_table(ladder))
    _render(console, ladder.warnings, tables, ladder.answer, ladder.details, ladder.notes)
    console.print(f"\nReport: {out / 'report.html'}", soft_wrap=True)


def _render(
    console: Console,
    warnings: Sequence[str],
    tables: "Sequence[ReportTable]",
    answer: str,
    details: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Print a report's main contents, the answer after the tables."""
    for warning in warnings:
        console.print(_text(f"Warning: {warning}", "yellow"))
    for table in [table for table in tables if table.rows]:
        printed = Table(title=_text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i, name in enumerate(table.head):
            printed.add_column(_text(name), justify="left" if i < table.left else "right", overflow="fold")
        for row in table.rows:
            printed.add_row(*map(_text, row))
        console.print(printed)
    console.print(_text(answer, "bold"))
    for sentence in details:
        console.print(_text(sentence))
    for note in notes:
        console.print(_text(f"Note: {note}", "dim"))


def _text(text: str, style: str = "") -> Text:
    """A text that is printed as it is."""
    return Text(printable(text), style)


def command_line() -> str:
    """The command line of this process."""
    return shlex.join(["moelm", *sys.argv[1:]])
