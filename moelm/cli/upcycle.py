"""`moelm upcycle`."""

from typing import Annotated

import typer

from moelm.cli.options import MAX_INT, Checkpoint, Overrides, RunPath, finite


def upcycle(
    run: RunPath,
    new_run: Annotated[str, typer.Argument(metavar="NEW_RUN", help="Name of the sparse run.")],
    overrides: Overrides = None,
    num_experts: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Copies of each feed-forward block.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Experts per token.")] = 2,
    noise: Annotated[
        float,
        typer.Option(min=0, callback=finite, help="Noise on each expert's weights, in standard deviations of each matrix."),
    ] = 0.0,
    reinit: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Fraction of each expert's hidden units to reinitialize.")
    ] = 0.0,
    checkpoint: Checkpoint = "last",
) -> None:
    """Turn a dense run into a mixture of experts. The experts start as copies of its feed-forward blocks."""
    from moelm.upcycle import upcycle_run

    new = upcycle_run(run, new_run, num_experts, top_k, noise, reinit, checkpoint, overrides or ())
    typer.echo(f"{new.path}: `moelm train {new.config} name=...` continues training in a run of its own.")
