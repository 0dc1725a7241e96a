"""`moelm prepare`."""

import typer

from moelm.cli.options import AsJson, ConfigPath, Overrides, print_json


def prepare(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tokenize a config's documents. Does nothing if that is already done."""
    from moelm.config import load_config
    from moelm.data.prepare import prepare as prepare_data
    from moelm.data.shards import read_manifest

    folder, worked = prepare_data(load_config(config, overrides or ()).data)
    manifest = read_manifest(folder)
    assert manifest is not None
    if as_json:
        print_json({"folder": str(folder), "prepared_now": worked, **manifest})
        return
    typer.echo(f"{folder} {'is prepared' if worked else 'was prepared before; nothing to do'}.")
    for name, split in manifest["splits"].items():
        typer.echo(
            f"  {name:5} {split['documents']:>10,} documents {split['tokens']:>14,} tokens {split['bytes']:>14,} bytes"
        )
    typer.echo(f"  vocabulary {manifest['vocab_size']:,}, exact duplicates skipped: {manifest['duplicates']:,}")
