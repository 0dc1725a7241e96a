"""Records of a Hugging Face dataset: streamed from the hub, or from a local directory."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moelm.config import SourceConfig
from moelm.data.files import SUFFIXES, read_through
from moelm.data.paths import MissingSource, files_below
from moelm.errors import MoelmError, first_line

TIMEOUT_S = 10.0
"""Timeout of the first request; without it, the client retries for half a minute if there is no network."""


def hub_records(source: SourceConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of `source.hub`, a dataset on the hub or in a local directory, each with its origin.

    Raises:
        MoelmError: it cannot be reached or read.
    """
    name, split = source.hub or "", source.split or "train"
    if Path(name).is_file():
        raise MoelmError(f"{name} is a file; read it as path: {name}.")
    if Path(name).is_dir():
        # The library takes a .zst file that is cut for a whole one.
        for path in files_below(Path(name)):
            if SUFFIXES.get(path.suffix.lower()) == "zst":
                read_through(path)
    else:
        _check_reachable(name)
    import datasets

    datasets.disable_progress_bars()
    try:
        for row, record in enumerate(_open(source, name, split), start=1):
            yield record, f"{name}, row {row}"
    except MoelmError:
        raise
    except Exception as error:
        # The library raises the errors of every transport and file format.
        raise MoelmError(f"The dataset {name} (split {split}) cannot be streamed: {_describe(error)}.") from error


def _open(source: SourceConfig, name: str, split: str) -> Iterable[dict[str, Any]]:
    """The dataset; a directory that `save_to_disk` wrote is read by its counterpart."""
    import datasets

    records: Iterable[dict[str, Any]]
    if (Path(name) / "dataset_dict.json").exists():
        if source.config is not None:
            raise MoelmError(f"{name} was written by save_to_disk and has no configurations; config does not apply to it.")
        saved = datasets.load_from_disk(name)
        if split not in saved:
            raise MoelmError(f"{name} has no split {split!r}; it has {', '.join(map(repr, saved))}.")
        records = saved[split]
    elif (Path(name) / "state.json").exists():
        if source.split is not None or source.config is not None:
            raise MoelmError(f"{name} holds a single split; config and split do not apply to it.")
        records = datasets.load_from_disk(name)
    else:
        if Path(name).is_dir() and glob.has_magic(folder := os.path.abspath(name)):
            raise MoelmError(
                f"The library for datasets takes [, * and ? in {folder} for a pattern; rename the directory, or read its "
                "files with path: ..."
            )
        records = datasets.load_dataset(name, source.config, split=split, streaming=True)
    return records


def _check_reachable(name: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except Exception as error:
        raise MissingSource(
            f"The dataset {name} cannot be reached on the Hugging Face hub ({_describe(error)}); check its name and "
            "the network, or use local files (path: ...) or the builtin corpus (name: builtin)."
        ) from error


def _describe(error: Exception) -> str:
    name, reason = type(error).__name__, first_line(error)
    return name if reason == name else f"{name}: {reason}"
