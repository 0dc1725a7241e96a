"""Checkpoints: written under a temporary name, checksummed, renamed; the newest whole one is what a run resumes from.

A checkpoint is a directory: torch.distributed.checkpoint's files, `progress.json`, and `manifest.json` with the size and
checksum of every other file. Weights and moments are stored by their names and places in the whole model, so what one
number of processes has written any other can read.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from moelm.distributed.world import ALONE, World
from moelm.errors import MoelmError
from moelm.model import Transformer

PREFIX = "step-"
UNFINISHED = ".writing"
Progress = dict[str, Any]
State = dict[str, Any]
T = TypeVar("T")


def fresh_progress() -> Progress:
    """Where a run stands before its first step; tokens, FLOPs and seconds are those of training alone."""
    return {"step": 0, "tokens": 0, "flops": 0, "time_s": 0.0, "val_loss": None}


class DamagedCheckpoint(MoelmError):
    """A checkpoint whose files are missing, cut short or changed."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return folder / f"{PREFIX}{step:08}"


def step_of(path: Path) -> int:
    """The step of a checkpoint by its name."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; their contents are not looked at."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def training_state(model: Transformer, optimizer: Optimizer) -> State:
    """Weights and moments under names that do not depend on how they are spread; not copies."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save_checkpoint(folder: Path, state: State, progress: Progress, world: World = ALONE) -> Path:
    """Write a checkpoint whole or not at all; each process of `world.savers` calls this and writes its part.

    Raises:
        OSError: on every process, for a full disk or an unwritable folder at one; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, progress["step"])
    work = target.with_name(f".{target.name}{UNFINISHED}")

    def finish() -> None:
        if world.first:
            (work / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
            files = {name: about for part in parts for name, about in part.items()}
            files["progress.json"] = _describe(work / "progress.json")
            (work / "manifest.json").write_text(json.dumps(dict(sorted(files.items())), indent=1), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)

    try:
        if world.first:
            shutil.rmtree(work, ignore_errors=True)
        with _quiet():
            save(state, checkpoint_id=work, process_group=world.savers, no_dist=world.size == 1)
        parts = _all_or_none(world, lambda: _describe_own(work, world))
        _all_or_none(world, finish)
    except (CheckpointException, RuntimeError) as error:
        raise OSError(f"{target.name} could not be written: {_cause(error)}") from error
    finally:
        if world.first:
            shutil.rmtree(work, ignore_errors=True)
    return target


def load_weights(path: Path, model: Transformer, world: World = ALONE) -> None:
    """Fill a model, each process its part, from a checkpoint.

    Raises:
        DamagedCheckpoint: its files are not what was written.
        MoelmError: it is of a model of another shape.
    """
    verify(path, world)
    _check_shapes(path, model)
    state = {"model": get_model_state_dict(model)}
    _load(path, state, world)
    set_model_state_dict(model, state["model"])


def load_training(path: Path, model: Transformer, optimizer: Optimizer, world: World = ALONE) -> Progress:
    """Fill model and optimizer, each process its part, and return where the run stood.

    A checkpoint with an `origin` has weights alone, which come from elsewhere; moments then stay as they are.

    Raises:
        DamagedCheckpoint: its files are not what was written.
        MoelmError: it is of a model of another shape.
    """
    load_weights(path, model, world)
    progress = read_progress(path)
    if "origin" not in progress:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _load(path, state, world)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return progress


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights as they are stored, in their own dtypes, by the model's names for them.

    Raises:
        DamagedCheckpoint: its files are not what was written.
    """
    verify(path)
    weights = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in _stored(path).items()}
    state: State = {"model": weights}
    _load(path, state, ALONE)
    return weights


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every weight, by the model's name for it."""
    described = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key.removeprefix("model."): about
        for key, about in described.items()
        if key.startswith("model.") and isinstance(about, TensorStorageMetadata)
    }


def _check_shapes(path: Path, model: Transformer) -> None:
    there = {name: tuple(about.size) for name, about in _stored(path).items()}
    here = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise MoelmError(
                f"The checkpoint {path} is of another model: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here."
            )


def _load(path: Path, state: State, world: World) -> None:
    try:
        with _quiet():
            load(state, checkpoint_id=path, no_dist=world.size == 1)
    except CheckpointException as error:
        raise DamagedCheckpoint(f"The checkpoint {path} is damaged: {_cause(error)}.") from error


def read_progress(path: Path) -> Progress:
    """Where a run stood at this checkpoint."""
    progress: Progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    return progress


def verify(path: Path, world: World = ALONE) -> None:
    """Compare every file with the manifest, the processes sharing the work.

    Raises:
        DamagedCheckpoint: on every process, naming the checkpoint and the file.
    """
    for problem in world.gather(_damage(path, world)):
        if problem is not None:
            raise DamagedCheckpoint(f"The checkpoint {path} is damaged: {problem}.")


def _damage(path: Path, world: World) -> str | None:
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its manifest.json is missing or unreadable"
    for name, described in list(files.items())[world.rank :: world.size]:
        try:
            if _describe(path / name) != described:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def clear_unfinished(folder: Path) -> None:
    """Remove what kills in the middle of saving have left."""
    for work in folder.glob(f".{PREFIX}*{UNFINISHED}"):
        shutil.rmtree(work, ignore_errors=True)


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Delete all but the `keep` checkpoints up to `newest`, the one with the best validation loss, and one of step 0, which
    holds weights from elsewhere.

    Later ones than `newest`, the one just saved, were found damaged when the run went on from an earlier one.
    """
    for path in list_checkpoints(folder):
        if path > newest:
            shutil.rmtree(path)
    best = best_checkpoint(folder)
    for path in list_checkpoints(folder)[:-keep]:
        if path not in (best, checkpoint_path(folder, 0)):
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
def _quiet() -> Iterator[None]:
    """Keep the library quiet about there being no other process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _all_or_none(world: World, act: Callable[[], T]) -> list[T]:
    """Do something on every process, and fail on all of them if it failed on one."""
    done: T | None = None
    failure: str | None = None
    try:
        done = act()
    except OSError as error:
        failure = str(error)
    results = world.gather((done, failure), world.savers)
    for _, found in results:
        if found is not None:
            raise OSError(found)
    return [cast(T, result) for result, _ in results]


def _describe_own(work: Path, world: World) -> dict[str, Any]:
    """The files that this process has written; the first one's are also those of all."""
    own = sorted(work.glob(f"__{world.rank}_*"))
    return {path.name: _describe(path) for path in own + ([work / ".metadata"] if world.first else [])}


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
