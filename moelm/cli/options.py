"""Arguments and options that several commands share, and how a command prints its result."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/demo-moe.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file's.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name under runs/.")]
Checkpoint = Annotated[str, typer.Option(help="last, best, or a step number.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

PIPE_WIDTH = 140
"""Columns of a table that is not printed on a terminal."""


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    typer.echo(json.dumps(content))


def stdout_console() -> Console:
    """A console for tables on stdout."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def plain_table(*headings: str) -> Table:
    """A table without borders; the first column is text, the others are right-aligned numbers."""
    table = Table(headings[0], box=None, header_style="")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table
