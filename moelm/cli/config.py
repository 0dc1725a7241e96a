"""`moelm config`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moelm.cli.options import AsJson, Overrides, print_json, warn_if_ineffective


def config(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/demo-moe.yaml.")
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of all configs, for editors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a config with its base, its overrides and all defaults. The output is a config with the same meaning."""
    from moelm.config import config_schema, dump_config, load_config

    if schema:
        if config is not None:
            raise typer.BadParameter("--schema describes every config; leave CONFIG out.")
        typer.echo(json.dumps(config_schema(), indent=2))
        return
    if config is None:
        raise typer.BadParameter("A CONFIG is expected, or --schema.")
    resolved = load_config(config, overrides or ())
    warn_if_ineffective(resolved)
    if as_json:
        print_json(resolved.model_dump(mode="json", exclude_none=True))
    else:
        typer.echo(dump_config(resolved), nl=False)
