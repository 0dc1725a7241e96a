"""Checkpoints: written under a temporary name, checksummed, renamed; the newest whole one is what a run resumes from.

A checkpoint is a directory: torch.distributed.checkpoint's files, `progress.json`, and `manifest.json` with the size and
checksum of every other file.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from moelm.errors import MoelmError
from moelm.model import Transformer

PREFIX = "step-"
Progress = dict[str, Any]


class DamagedCheckpoint(MoelmError):
    """A checkpoint whose files are missing, cut short or changed."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return folder / f"{PREFIX}{step:08}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; their contents are not looked at."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def save_checkpoint(folder: Path, model: Transformer, optimizer: Optimizer, progress: Progress) -> Path:
    """Write a checkpoint whole or not at all.

    Raises:
        OSError: a full disk or an unwritable folder; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, progress["step"])
    work = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        weights, moments = get_state_dict(model, optimizer)
        with _one_process():
            save({"model": weights, "optimizer": moments}, checkpoint_id=work, no_dist=True)
        (work / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        files = {path.name: _describe(path) for path in sorted(work.iterdir())}
        (work / "manifest.json").write_text(json.dumps(files, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    except (CheckpointException, RuntimeError) as error:
        raise OSError(f"{target.name} could not be written: {_cause(error)}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def load_weights(path: Path, model: Transformer) -> None:
    """Fill a model from a verified checkpoint."""
    verify(path)
    state: dict[str, Any] = {"model": model.state_dict()}
    with _one_process():
        load(state, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state["model"])


def load_training(path: Path, model: Transformer, optimizer: Optimizer) -> Progress:
    """Fill model and optimizer from a verified checkpoint and return where the run stood."""
    verify(path)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    with _one_process():
        load(state, checkpoint_id=path, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_progress(path)


def read_progress(path: Path) -> Progress:
    """Where a run stood at this checkpoint."""
    progress: Progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    return progress


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedCheckpoint: naming the checkpoint and the file.
    """
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DamagedCheckpoint(f"The checkpoint {path} is damaged: its manifest.json is missing or unreadable.") from None
    for name, described in files.items():
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"The checkpoint {path} is damaged: {name} is missing.")
        if _describe(path / name) != described:
            raise DamagedCheckpoint(f"The checkpoint {path} is damaged: {name} is not what was written.")


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Delete all but the `keep` checkpoints up to `newest` and the one with the best validation loss.

    Later ones than `newest`, the one just saved, were found damaged when the run went on from an earlier one.
    """
    for path in list_checkpoints(folder):
        if path > newest:
            shutil.rmtree(path)
    best = best_checkpoint(folder)
    for path in list_checkpoints(folder)[:-keep]:
        if path != best:
            shutil.rmtree(path)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss at its own step."""
    scored = []
    for path in list_checkpoints(folder):
        try:
            loss = read_progress(path).get("val_loss")
        except (OSError, ValueError):
            continue  # damaged; loading it would say so, choosing the best passes over it
        if loss is not None:
            scored.append((loss, path))
    return min(scored)[1] if scored else None


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep the library quiet about there being no other process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        return str(failure[0] if isinstance(failure, tuple) else failure)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
