"""`moelm sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moelm.cli.compare import command_line, print_comparison, print_ladder
from moelm.cli.options import MAX_INT, AsJson, Overrides, plain_table, print_json, stdout_console
from moelm.formats import count_noun, duration, exponent, quantity

if TYPE_CHECKING:
    from moelm.sweep.variant import SweepVariant


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
    from moelm.compare.report import write_report
    from moelm.compare.variants import make_variant
    from moelm.report.directory import check_report_directory
    from moelm.runs.record import read_runs
    from moelm.sweep.budget import estimate_seconds
    from moelm.sweep.config import load_sweep
    from moelm.sweep.execute import train_all
    from moelm.sweep.plan import plan_sweep, sweep_json

    config = load_sweep(path)
    out = out or Path("reports") / config.name
    check_report_directory(out)
    variants = plan_sweep(path, config, overrides or (), nproc * jobs)
    if dry_run:
        seconds = estimate_seconds(variants) if nproc == 1 else None
        if as_json:
            print_json(sweep_json(config, variants, seconds))
        else:
            stdout_console().print(_variant_table(variants, seconds))
            _print_total(variants, seconds)
        return
    if not as_json:
        stdout_console().print(_variant_table(variants))
    train_all(variants, nproc, jobs, config.budget)
    if config.sizes:
        _report_ladder(variants, out, as_json)
        return
    comparison = compare([make_variant(each.label, read_runs(each.all_paths)) for each in variants])
    write_report(comparison, out, command_line())
    print_comparison(comparison, out, as_json)


def _report_ladder(variants: Sequence["SweepVariant"], out: Path, as_json: bool) -> None:
    """Write and print the comparison of a sweep with sizes."""
    from moelm.compare.ladder.comparison import compare_ladder
    from moelm.compare.ladder.points import make_side
    from moelm.compare.ladder.report import ladder_json, write_ladder_report
    from moelm.compare.variants import Variant, make_variant
    from moelm.runs.record import read_runs

    sides: dict[str, dict[str, Variant]] = {}
    for each in variants:
        sides.setdefault(each.variant, {})[str(each.size)] = make_variant(each.label, read_runs(each.all_paths))
    ladder = compare_ladder([make_side(name, sizes) for name, sizes in sides.items()])
    write_ladder_report(ladder, out, command_line())
    if as_json:
        print_json(ladder_json(ladder))
    else:
        print_ladder(ladder, out)


def _variant_table(variants: Sequence["SweepVariant"], seconds: Sequence[float] | None = None) -> Table:
    """The variants, with the time of each run if known."""
    head = ("variant", "hidden_dim", "active", "total", "FLOPs/token", "steps", "tokens", "FLOPs", "runs")
    table = plain_table(*head, *(["time of a run"] if seconds else []))
    for i, variant in enumerate(variants):
        row = variant.as_dict()
        amounts = [row[key] for key in ("active", "total", "flops_per_token", "steps", "tokens", "flops")]
        time = [duration(seconds[i])] if seconds else []
        table.add_row(variant.label, str(row["hidden_dim"]), *map(quantity, amounts), str(len(row["runs"])), *time)
    return table


def _print_total(variants: Sequence["SweepVariant"], seconds: Sequence[float] | None) -> None:
    """The cost of all runs; branches of runs are not in it."""
    runs = [len(variant.runs) for variant in variants]
    flops = sum(count * variant.flops for count, variant in zip(runs, variants, strict=True))
    total = f"{count_noun(sum(runs), 'run')}, {exponent(flops)} FLOPs"
    if seconds is not None:
        time = sum(count * each for count, each in zip(runs, seconds, strict=True))
        total += f", about {duration(time)} one after the other on this machine, by the speed of a few steps"
    stdout_console().print(f"\n{total}.")
