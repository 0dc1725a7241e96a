"""`moelm eval`."""

from typing import Annotated, Literal

import typer

from moelm.cli.options import AsJson, Checkpoint, DataOfModel, RunOrModel, StreamLayers, print_json
from moelm.console import printable_line


def evaluate(
    run: RunOrModel,
    split: Annotated[Literal["val", "train"], typer.Option(help="Which split of the data.")] = "val",
    checkpoint: Checkpoint = "last",
    data: DataOfModel = None,
    stream_layers: StreamLayers = False,
    as_json: AsJson = False,
) -> None:
    """Score a run on a whole split. Prints loss, perplexity and bits per byte, overall and by domain."""
    from moelm.distributed.ranks import distributed_context
    from moelm.evaluation.losses import evaluate as evaluate_split
    from moelm.huggingface.opening import open_model
    from moelm.runs.record import LOSSY_NOTE

    opened = open_model(run, checkpoint, split, data, stream_layers)
    with distributed_context() as ranks:
        evaluation = evaluate_split(opened.model, opened.rows, opened.dtype, opened.config.data.document_mask, ranks)
        if not ranks.is_main:
            return
    if as_json:
        print_json({"run": run, "split": split, **evaluation.as_dict(), "lossy": opened.lossy})
        return
    typer.echo(f"{'':24}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>12}")
    for name, score in [("all", evaluation.overall), *evaluation.domains.items()]:
        typer.echo(f"{printable_line(name):24}{score.loss:9.4f}{score.perplexity:12.3f}{score.bpb:11.4f}{score.tokens:12,}")
    if opened.lossy:
        typer.echo(f"The tokenizer {LOSSY_NOTE}")
