"""`moelm prepare`."""

from typing import Any

import typer
from rich.table import Table

from moelm.cli.options import AsJson, ConfigPath, Overrides, plain_table, print_json, stdout_console, warn_if_ineffective
from moelm.console import warn


def prepare(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tokenize a config's documents. Where that is already done, check the files by their hashes."""
    from moelm.config import load_config
    from moelm.data.effective_documents import effective_documents, few_documents_warning
    from moelm.data.prepare import prepare as prepare_data
    from moelm.data.shards import Split, read_manifest

    run_config = load_config(config, overrides or ())
    warn_if_ineffective(run_config)
    folder, worked = prepare_data(run_config.data, verify=True)
    manifest = read_manifest(folder)
    assert manifest is not None
    lengths = Split(folder, "val", manifest).documents["tokens"]
    effective = effective_documents(lengths)
    if as_json:
        numbers = {"folder": str(folder), "prepared_now": worked, "effective_val_documents": effective}
        print_json({**numbers, **manifest})
        return
    typer.echo(f"{folder} {'is prepared' if worked else 'was prepared before, and its files are as they were written'}.")
    for name, split in manifest["splits"].items():
        typer.echo(
            f"  {name:5} {split['documents']:>10,} documents {split['tokens']:>14,} tokens {split['bytes']:>14,} bytes"
        )
    typer.echo(f"  the validation documents weigh as much as {effective:,.0f} of equal length")
    if not worked and (warning := few_documents_warning(len(lengths), effective)):
        warn(warning)
    typer.echo(f"  vocabulary {manifest['vocab_size']:,}, exact duplicates skipped: {manifest['duplicates']:,}\n")
    stdout_console().print(_account_table(manifest["sources"]))


def _account_table(sources: list[dict[str, Any]]) -> Table:
    """What became of the documents and characters of each source."""
    documents = ("read", "kept", "duplicates", "blank", "cut")
    table = plain_table("documents of", *documents, "characters kept", "left out", "unknown", "lost")
    for source in sources:
        counts = [source[name] for name in (*documents, "characters")]
        counts += [source.get("left_out_characters", 0), source["unknown_characters"], source["lost_characters"]]
        table.add_row(source["label"], *(f"{count:,}" for count in counts))
    return table
