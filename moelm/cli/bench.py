"""`moelm bench`."""

from pathlib import Path
from typing import Annotated

import typer

from moelm.cli.options import MAX_INT, AsJson, plain_table, print_json, stdout_console


def bench(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="Configs, and overrides for all of them.")
    ],
    vary: Annotated[str | None, typer.Option(metavar="KEY=A,B,...", help="One variant for each value.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Timed rounds.")] = 10,
    peers: Annotated[bool, typer.Option("--peers", help="Also time Hugging Face's models of the same shapes.")] = False,
    balanced: Annotated[
        bool,
        typer.Option(
            "--balanced", help="Also time each mixture with equal loads of its experts, whatever its router selects."
        ),
    ] = False,
    generate: Annotated[
        int,
        typer.Option(min=0, max=MAX_INT, metavar="B", help="Time the continuation of B prompts instead of training steps."),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Time training steps or generation. Several configs take turns; nothing is saved."""
    from moelm.bench import list_variants, run_rounds
    from moelm.bench.workloads import Workload
    from moelm.console import ProgressLine
    from moelm.errors import MoelmError

    overrides = [argument for argument in configs if "=" in argument]
    paths = [Path(argument) for argument in configs if "=" not in argument]
    if balanced and generate:
        raise MoelmError("--balanced is for training steps; expected is either --balanced or --generate.")
    variants = list_variants(paths, overrides, vary, peers, training=not generate, balanced=balanced)
    with ProgressLine("Building the models …") as progress_line:
        timings = run_rounds(variants, Workload(generate), rounds, progress_line.update)
    results = [timing.as_dict() for timing in timings]
    if as_json:
        print_json({"schema": 2, "rounds": rounds, "variants": results})
        return
    phases = timings[0].phases
    table = plain_table(
        "variant", "precision", "allocator", "ms", *phases, "ratio", "tokens/s", "MFU", "load max/mean", "peak MiB"
    )
    for timing, result in zip(timings, results, strict=True):
        table.add_row(
            timing.variant.name,
            result["precision"],
            "keeps" if timing.variant.keeps_memory else "default",
            *(f"{1e3 * seconds:,.1f}" for seconds in (result["step_s"], *timing.phases.values())),
            f"{timing.ratio_to(timings[0]):.2f}",
            f"{result['tokens_per_s']:,.0f}",
            f"{result['mfu']:.0%}" if timing.flops else "",
            f"{timing.load:.2f}" if timing.load is not None else "",
            f"{timing.memory / 2**20:,.0f}",
        )
    stdout_console().print(table)
