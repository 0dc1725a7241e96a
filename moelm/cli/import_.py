"""`moelm import`."""

from pathlib import Path
from typing import Annotated

import typer

from moelm.cli.options import Overrides


def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="config.json, tokenizer.json and safetensors.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the new run.")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with data and training settings for the run.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, if the directory has none.")] = None,
) -> None:
    """Turn a Hugging Face model into a run: Mixtral, OLMoE, Qwen, GLM, Granite, Llama and similar models."""
    from moelm.huggingface.importing import import_model

    new = import_model(source, run, overrides or (), config, tokenizer)
    typer.echo(f"{new.path}: `moelm train {new.config} name=...` continues training in a run of its own.")
