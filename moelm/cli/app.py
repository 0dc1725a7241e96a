"""The `moelm` program: its commands, `--version`, and how an error ends it."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from moelm import __version__
from moelm.cli import (
    analyze,
    bench,
    compare,
    config,
    eval_,
    export,
    import_,
    lm_eval,
    plan,
    prepare,
    sample,
    sweep,
    train,
    upcycle,
)
from moelm.cli.boundary import error_boundary, open_streams, require_current_directory

app = typer.Typer(
    help="Train mixture-of-experts language models beside dense baselines, and measure what sparsity buys.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "config": config.config,
    "prepare": prepare.prepare,
    "train": train.train,
    "eval": eval_.evaluate,
    "sample": sample.sample,
    "compare": compare.compare,
    "sweep": sweep.sweep,
    "analyze": analyze.analyze,
    "plan": plan.plan,
    "bench": bench.bench,
    "export": export.export,
    "import": import_.import_,
    "upcycle": upcycle.upcycle,
    "lm-eval": lm_eval.lm_eval,
}
for name, command in COMMANDS.items():
    app.command(name)(error_boundary()(command))  # within typer, which ends quietly at a broken pipe of any kind


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(f"moelm {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error is one sentence on stderr and exit code 2."""
    open_streams()
    with error_boundary():
        require_current_directory()
        try:
            # Typer has no options whose value may be left out.
            app(["--show-experts=last" if argument == "--show-experts" else argument for argument in sys.argv[1:]])
        finally:
            sys.stdout.flush()
