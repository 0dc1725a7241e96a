"""Arguments and options that several commands share, and how a command prints its result."""

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelm.console import printable, warn

if TYPE_CHECKING:
    from moelm.config import RunConfig

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/demo-moe.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file's.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name under runs/.")]
RunOrModel = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run directory, its name under runs/, or a directory in the Hugging Face format."),
]
DataOfModel = Annotated[
    Path | None,
    typer.Option(help="A config whose data a Hugging Face model reads.", show_default="the builtin corpus"),
]
StreamLayers = Annotated[
    bool, typer.Option("--stream-layers", help="Read a Hugging Face model layer by layer, so that one layer is in memory.")
]
Checkpoint = Annotated[str, typer.Option(help="last, best, or a step number.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

PIPE_WIDTH = 140
"""Columns of a table that is not printed on a terminal."""


MAX_INT = 2**31 - 1
"""The largest whole number of an option that counts something."""


def finite(value: float | None) -> float | None:
    """Refuse the option values `nan` and `inf`, which pass every check of a range."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def finite_each(values: list[float] | None) -> list[float] | None:
    """`finite` for an option that may be repeated."""
    for value in values or ():
        finite(value)
    return values


def warn_if_ineffective(config: "RunConfig") -> None:
    """Warn of settings without effect, on the main process alone."""
    from moelm.config import describe_ineffective

    if os.environ.get("RANK", "0") == "0":
        for sentence in describe_ineffective(config):
            warn(sentence)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line; numbers that JSON does not have are null."""
    typer.echo(json.dumps(_finite_json(content), allow_nan=False))


def _finite_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PlainConsole(Console):
    """A console on stdout that prints text as it is: no markup, no control characters."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, width=width)

    def render_str(self, text: str, **options: Any) -> Text:
        """A text, as a cell or a line."""
        return super().render_str(printable(text), **options)


def stdout_console() -> Console:
    """A console for tables on stdout."""
    return PlainConsole(None if sys.stdout.isatty() else PIPE_WIDTH)


def plain_table(*headings: str) -> Table:
    """A table without borders; the first column is text, the others are right-aligned numbers."""
    table = Table(headings[0], box=None, header_style="")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table
