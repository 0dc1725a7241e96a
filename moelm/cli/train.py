"""`moelm train`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from moelm.cli.boundary import OutputError
from moelm.cli.options import ConfigPath, Overrides, warn_if_ineffective
from moelm.errors import MoelmError


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[Literal["auto", "never"], typer.Option(help="Continue a run of this name, or refuse to.")] = "auto",
    branch_from: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Start from a checkpoint of a run that differs in train.steps alone (wsd or constant schedule), before "
            "either decays.",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Trace a few steps: a table and trace.json.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often all processes are restarted when one fails.")] = 0,
) -> None:
    """Train a run. An interrupted one continues from its newest checkpoint."""
    from moelm.config import load_config
    from moelm.runs.directory import RunDirectory

    run_config = load_config(config, overrides or ())
    run = RunDirectory(Path("runs") / run_config.name)
    if nproc > 1 or max_restarts:
        from moelm.distributed.launcher import launch
        from moelm.distributed.parallel_dims import resolve_parallel_dims
        from moelm.distributed.ranks import is_launched
        from moelm.runs.lock import refuse_if_locked

        if is_launched():
            raise MoelmError(f"--nproc is {nproc}, but this process was started by a launcher; leave --nproc out.")
        if resume == "never":
            run.require_new()
        refuse_if_locked(run)
        resolve_parallel_dims(run_config, nproc)
        argv = ["train", str(config), *(overrides or ()), "--resume", resume, *["--profile"] * profile]
        argv += ["--branch-from", branch_from] if branch_from is not None else []
        raise typer.Exit(launch(argv, nproc, max_restarts))
    from moelm.train.setup import train as train_run

    warn_if_ineffective(run_config)
    evaluation = train_run(run_config, run, resume, profile, branch_from)
    if evaluation is not None:
        score = evaluation.overall
        with suppress(OutputError):  # the run is finished and saved, whether anybody reads this or not
            typer.echo(f"{run.path}: validation loss {score.loss:.4f} nats/token, {score.bpb:.4f} bits/byte.")
