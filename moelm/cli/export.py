"""`moelm export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moelm.cli.options import Checkpoint, RunPath, finite


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty directory.")],
    checkpoint: Checkpoint = "last",
    dtype: Annotated[
        Literal["stored", "float32", "bf16", "float16"],
        typer.Option(help="Dtype of the weights; `stored` leaves them as they are."),
    ] = "stored",
    shard_gb: Annotated[
        float, typer.Option(min=1e-6, callback=finite, help="Maximum gigabytes in one file of weights.")
    ] = 5.0,
) -> None:
    """Write a run in the Hugging Face format. Weights, config, tokenizer and model card."""
    from moelm.huggingface.export import export_run

    architecture = export_run(run, out, checkpoint, dtype, shard_gb)
    typer.echo(f"{out}: {architecture}; AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it.")
