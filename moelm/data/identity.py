"""The identity of a run's data: the hashes of its content that a run records, and the folder that has this content."""

from pathlib import Path
from typing import Any, NamedTuple

from moelm.config import DataConfig
from moelm.console import log
from moelm.data.paths import MissingSource
from moelm.data.prepare import find_prepared, prepare, prepared_folder
from moelm.data.shards import read_manifest
from moelm.errors import MoelmError
from moelm.formats import join_names


class DataRecord(NamedTuple):
    """What a run records of its data."""

    data_folder: str
    data_fingerprint: str
    """Of the token shards, document tables and domains of both splits."""
    tokenizer_fingerprint: str
    eval_fingerprint: str
    """Of what two runs must share for their validation losses to be comparable."""


def folder_to_read(data: DataConfig, record: DataRecord | None = None) -> Path:
    """The folder of an evaluation's data, whether it is prepared or not.

    Args:
        record: of the run; where the recorded content is still prepared, it is read, whatever became of the sources.

    Raises:
        MissingSource: the sources are gone, and nothing was prepared from them.
    """
    if record is not None and (recorded := _recorded_folder(data, record)) is not None:
        return recorded
    try:
        return prepared_folder(data)
    except MissingSource:
        if (found := find_prepared(data)) is not None:
            return found
        if record is not None:
            return Path(record.data_folder)
        raise


def folder_to_train_on(data: DataConfig, record: DataRecord | None) -> tuple[Path, bool]:
    """The folder of a training's data, which is prepared if the sources have changed or nothing is prepared yet.

    Args:
        record: of a run that exists.

    Returns:
        The folder, and whether it was prepared now.

    Raises:
        MoelmError: see `prepare`.
    """
    recorded = None if record is None else _recorded_folder(data, record)
    if recorded is not None:
        try:
            current = prepared_folder(data)
        except MissingSource as error:
            log(f"{error} The run continues on the data that was prepared in {recorded}.")
            return recorded, False
        if current.resolve() == recorded.resolve():
            return recorded, False
    folder, worked = prepare(data)
    if worked:
        log(f"The data has been prepared in {folder}.")
    return folder, worked


def check_record(run: Path, record: DataRecord, data: DataConfig, folder: Path) -> None:
    """Refuse data of other content than a run has recorded.

    Args:
        folder: the data that would be used.

    Raises:
        MoelmError: naming both, and what can be done.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise MoelmError(
            f"The data of {run}, {record.data_fingerprint} in {record.data_folder}, cannot be found from this directory; "
            "run `moelm prepare` with the run's config.yaml first."
        )
    if (manifest["data_sha256"], manifest["tokenizer_sha256"]) == (record.data_fingerprint, record.tokenizer_fingerprint):
        return
    recorded = _recorded_folder(data, record)
    changed = _changed_inputs(data, recorded, manifest)
    if changed == ["builtin"]:
        remedies = "or install the earlier versions of the packages that the builtin corpus is made of"
    elif recorded is None:
        remedies = "or restore them"
    else:
        remedies = f"restore them, or move the changed files away to continue on the data in {recorded}"
    raise MoelmError(
        f"{run} was trained on the data {record.data_fingerprint} in {record.data_folder}, but its inputs "
        f"({join_names(changed)}) have changed and give {manifest['data_sha256']} in {folder}; choose another "
        f"name=..., {remedies}."
    )


def _recorded_folder(data: DataConfig, record: DataRecord) -> Path | None:
    """The folder with the recorded content: the recorded one, or another one that was prepared with these settings."""
    folder = Path(record.data_folder)
    manifest = read_manifest(folder)
    if manifest is not None and manifest["data_sha256"] == record.data_fingerprint:
        return folder
    return find_prepared(data, record.data_fingerprint)


def _changed_inputs(data: DataConfig, recorded: Path | None, manifest: dict[str, Any]) -> list[str]:
    """The sources and the tokenizer that differ from the recorded ones; all of them if that cannot be known."""
    labels = [source.label for source in data.sources]
    before = None if recorded is None else read_manifest(recorded)
    if before is not None:
        # The numbers of inputs differ if the record is of a run with other sources.
        pairs = zip(labels, before["recipe"]["inputs"], manifest["recipe"]["inputs"], strict=False)
        changed = [label for label, old, new in pairs if old != new]
        if before["tokenizer_sha256"] != manifest["tokenizer_sha256"] and data.tokenizer.path is not None:
            changed.append(data.tokenizer.path)
        labels = changed or labels
    return labels
