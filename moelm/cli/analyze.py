"""`moelm analyze`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from moelm.cli.options import (
    MAX_INT,
    AsJson,
    Checkpoint,
    DataOfModel,
    RunOrModel,
    StreamLayers,
    plain_table,
    print_json,
    stdout_console,
)
from moelm.report.table import NO_VALUE


def analyze(
    run: RunOrModel,
    out: Annotated[Path, typer.Option(help="A new or empty directory.")],
    split: Annotated[Literal["val", "train"], typer.Option(help="Which split of the data.")] = "val",
    tokens: Annotated[
        int, typer.Option(min=1, max=2**53, help="Approximate number of tokens to read, sampled at random.")
    ] = 1_000_000,
    permutations: Annotated[
        int, typer.Option(min=1, max=MAX_INT, help="Permutations of the documents' domains for each p.")
    ] = 999,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    ablate: Annotated[
        Literal["none", "layers", "all"],
        typer.Option(help="Measure the loss with other routes and fewer experts; all: also without each expert."),
    ] = "none",
    ablate_tokens: Annotated[
        int, typer.Option(min=1, max=2**53, help="Approximate number of tokens of each ablation.")
    ] = 32_768,
    checkpoint: Checkpoint = "last",
    data: DataOfModel = None,
    stream_layers: StreamLayers = False,
    as_json: AsJson = False,
) -> None:
    """Report the routing of a run. Shows which experts process which domains and tokens, compared with chance."""
    from moelm.analyze.report import analyze_run

    report = analyze_run(
        run, out, split, checkpoint, tokens, permutations, seed, ablate, ablate_tokens, data, stream_layers
    )
    if report is None:
        return  # another process of this launch prints it
    if as_json:
        print_json(report)
        return
    console = stdout_console()
    _print_routing(console, report)
    console.print(f"\nReport: {out / 'routing.html'}", soft_wrap=True)


def _print_routing(console: Console, report: dict[str, Any]) -> None:
    """Print a row for each sparse layer, a line for each other checkpoint, and what ablations say."""
    from moelm.analyze.ablation.page import ablation_sentences, routes_table

    console.print(f"{report['tokens']:,} tokens of {report['documents']:,} documents in {len(report['domains'])} domains")
    table = plain_table(
        "layer", "max/mean", "dead", "V", "p", "same first", "shuffled", "uniform", "entropy", "margin", "cosine"
    )
    for layer in report["layers"]:
        first, association = layer["repetition"]["first"], layer["association"].get("all")
        table.add_row(
            str(layer["layer"]),
            f"{layer['load_max_over_mean']:.2f}",
            str(len(layer["dead_experts"])),
            *((f"{association['cramers_v']:.3f}", f"{association['p']:.3g}") if association else (NO_VALUE, NO_VALUE)),
            *map(_share, (first["all"], first["shuffled"], first["uniform"])),
            f"{layer['entropy']['all']:.3f}",
            f"{layer['margin']['all']:.3f}",
            _share(layer["weight_similarity"]["mean"]),
        )
    console.print(table)
    uniform = report["layers"][0]["saturation"]["uniform"]["experts"]
    for layers in zip(*(layer["saturation"]["checkpoints"] for layer in report["layers"]), strict=True):
        shares = " ".join(f"{layer['experts']:.3f}" for layer in layers)
        console.print(f"experts in common with step {layers[0]['step']:,}, by layer: {shares} (uniform {uniform:.3f})")
    if ablation := report["ablation"]:
        routes = routes_table(ablation, intervals=False)
        console.print(f"\n{routes.title}:")
        table = plain_table(*routes.head)
        for row in routes.rows:
            table.add_row(*row)
        console.print(table)
        for sentence in ablation_sentences(ablation):
            console.print(sentence)


def _share(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3f}"
