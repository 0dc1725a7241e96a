"""`moelm sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moelm.cli.compare import command_line, print_comparison
from moelm.cli.options import MAX_INT, AsJson, Overrides, plain_table, print_json, stdout_console
from moelm.formats import quantity

if TYPE_CHECKING:
    from moelm.sweep.plan import SweepVariant


def sweep(
    path: Annotated[Path, typer.Argument(metavar="SWEEP", help="A YAML file, such as configs/sweeps/experts.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the report (default: reports/NAME).")] = None,
    nproc: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Processes of each run, one per GPU.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Runs at the same time, which share the CPUs.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the variants of a sweep. Ends in their comparison; an interrupted sweep continues."""
    from moelm.compare.comparison import compare
    from moelm.compare.report import check_report_directory, write_report
    from moelm.compare.variants import make_variant
    from moelm.runs.record import read_runs
    from moelm.sweep.config import load_sweep
    from moelm.sweep.execute import train_all
    from moelm.sweep.plan import plan_sweep, sweep_json

    config = load_sweep(path)
    out = out or Path("reports") / config.name
    check_report_directory(out)
    variants = plan_sweep(path, config, overrides or (), nproc * jobs)
    if not as_json:
        stdout_console().print(_variant_table(variants))
    if dry_run:
        if as_json:
            print_json(sweep_json(config, variants))
        return
    train_all(variants, nproc, jobs, config.budget)
    comparison = compare([make_variant(each.label, read_runs(each.all_paths)) for each in variants])
    write_report(comparison, out, command_line())
    print_comparison(comparison, out, as_json)


def _variant_table(variants: Sequence["SweepVariant"]) -> Table:
    table = plain_table("variant", "hidden_dim", "active", "total", "FLOPs/token", "steps", "tokens", "FLOPs", "runs")
    for variant in variants:
        row = variant.as_dict()
        amounts = [row[key] for key in ("active", "total", "flops_per_token", "steps", "tokens", "flops")]
        table.add_row(variant.label, str(row["hidden_dim"]), *map(quantity, amounts), str(len(row["runs"])))
    return table
