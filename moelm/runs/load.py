"""Loading the model, tokenizer and data of a run, and creating a run from existing weights."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm import __version__
from moelm.atomic import atomic_directory
from moelm.config import RunConfig, dump_config
from moelm.data.identity import check_record, folder_to_read
from moelm.data.loader import Rows, open_folder
from moelm.data.tokenizer import Tokenizer, tokenizer_fingerprint
from moelm.errors import MoelmError
from moelm.hardware import dtype_of, keep_memory, pick_device
from moelm.model import Transformer, build_model
from moelm.runs.checkpoint import fresh_progress, load_weights, save_checkpoint
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import check_data_tokenizer, load_run_config, load_tokenizer, read_data_record


class OpenedRun(NamedTuple):
    """A trained model with one split of its data, on this process's device."""

    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    rows: Rows
    lossy: bool
    """See `PreparedData`."""
    device: torch.device
    dtype: torch.dtype
    """Dtype of matrix products."""


def load_run(
    run: str | Path, checkpoint: str = "last", device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer, RunConfig]:
    """Load a trained model with its tokenizer and config.

    Args:
        run: a run's directory, or its name under `runs/`.
        checkpoint: `last`, `best` or a step number.

    Raises:
        MoelmError: no such run or checkpoint, a damaged one, or a config.yaml that is not the one of the weights.
    """
    directory = RunDirectory.find(run)
    config = load_run_config(directory)
    path = directory.checkpoint(checkpoint)
    tokenizer = load_tokenizer(directory)
    model = build_model(config.model, config.seed)
    load_weights(path, model)
    return model.to(device).eval(), tokenizer, config


def open_run(run: str | Path, checkpoint: str, split: str) -> OpenedRun:
    """Load a trained model and the `train` or `val` split of its data.

    Raises:
        MoelmError: no such run or checkpoint, a damaged one, data that is not prepared, or another data than the run's.
    """
    keep_memory()
    device = pick_device()
    model, tokenizer, config = load_run(run, checkpoint, device)
    directory = RunDirectory.find(run)
    record = read_data_record(directory)
    folder = folder_to_read(config.data, record)
    if record is not None:
        check_record(directory.path, record, config.data, folder)
    data = open_folder(config, folder)
    check_data_tokenizer(directory, data.record)
    rows = data.val if split == "val" else data.train
    return OpenedRun(model, tokenizer, config, rows, data.lossy, device, dtype_of(config.train.precision, device))


def create_run(
    run: RunDirectory, config: RunConfig, tokenizer: Tokenizer, weights: dict[str, Tensor], origin: dict[str, Any]
) -> None:
    """Create a run at step 0 from existing weights, completely or not at all.

    Args:
        weights: by parameter name; stored in their own dtypes.
        origin: where they come from, as JSON.

    Raises:
        MoelmError: it cannot be written.
    """
    try:
        with atomic_directory(run.path) as path:
            work = RunDirectory(path)
            work.checkpoints.mkdir()
            save_checkpoint(work.checkpoints, {"model": weights}, {**fresh_progress(), "origin": origin})
            tokenizer.save(work.tokenizer)
            recorded = {
                "tokenizer_fingerprint": tokenizer_fingerprint(work.tokenizer),
                "model": config.model.model_dump(mode="json", exclude_none=True),
                "origin": origin,
            }
            work.environment.write_text(json.dumps({"moelm": __version__, **recorded}, indent=1), encoding="utf-8")
            work.metrics.touch()
            work.config.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise MoelmError(f"The run {run.path} cannot be written: {error}.") from error
