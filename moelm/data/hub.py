"""Records of a Hugging Face dataset, streamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelm.config import SourceConfig
from moelm.errors import MoelmError

TIMEOUT_S = 10.0
"""Timeout of the first request; without it, the client retries for half a minute if there is no network."""


def hub_records(source: SourceConfig) -> Iterator[tuple[Any, str]]:
    """Stream the records of `source.hub`, a dataset on the hub or in a local directory, each with its origin.

    Raises:
        MoelmError: it cannot be reached or read.
    """
    name = source.hub or ""
    if not Path(name).exists():
        _check_reachable(name)
    import datasets

    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(name, source.config, split=source.split, streaming=True)
        for row, record in enumerate(stream, start=1):
            yield record, f"{name}, row {row}"
    except MoelmError:
        raise
    except Exception as error:
        # The library raises the errors of every transport and file format.
        raise MoelmError(f"The dataset {name} (split {source.split}) cannot be streamed: {_first_line(error)}") from error


def _check_reachable(name: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except Exception as error:
        raise MoelmError(
            f"The dataset {name} cannot be reached on the Hugging Face hub ({_first_line(error)}); check its name and "
            "the network, or use local files (path: ...) or the builtin corpus (name: builtin)."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
