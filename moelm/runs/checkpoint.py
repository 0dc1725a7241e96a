"""Checkpoints: their files, saving, loading and verification.

A checkpoint is a directory: torch.distributed.checkpoint files, `progress.json`, and `manifest.json` with the size
and checksum of every other file. It does not depend on the number of processes or on sharding. No random state is
stored, because random numbers are functions of seed, step and token.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

from moelm.atomic import atomic_directory, remove_temporary, temporary_path
from moelm.console import warn
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.errors import MoelmError, first_line
from moelm.model import Transformer

PREFIX = "step-"
Progress = dict[str, Any]
State = dict[str, Any]
T = TypeVar("T")


def fresh_progress() -> Progress:
    """The progress of a run before its first step; tokens, FLOPs and seconds exclude evaluation and saving."""
    return {"step": 0, "tokens": 0, "flops": 0, "time_s": 0.0, "val_loss": None}


class DamagedCheckpoint(MoelmError):
    """A checkpoint whose files are missing, truncated or modified."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return folder / f"{PREFIX}{step:08}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; their contents are not verified."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def training_state(model: Transformer, optimizer: Optimizer) -> State:
    """Weights, buffers and optimizer state under names that do not depend on sharding; references, not copies."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": optimizer_state}


def save_checkpoint(folder: Path, state: State, progress: Progress, ranks: Ranks = SINGLE_PROCESS) -> Path:
    """Write a checkpoint completely or not at all; every process calls this and writes its shard.

    Raises:
        OSError: on every process, for a full disk or an unwritable folder on one; earlier checkpoints are untouched.
    """
    target = checkpoint_path(folder, progress["step"])
    work = temporary_path(target, "checkpoint")
    try:
        with ExitStack() as stack:

            def begin() -> None:
                if ranks.is_main:
                    stack.enter_context(atomic_directory(target, work, replace=True))

            _on_all_ranks(ranks, begin)
            with _no_single_process_warning():
                save(state, checkpoint_id=work, process_group=ranks.checkpoint_group, no_dist=ranks.size == 1)
            files = _on_all_ranks(ranks, lambda: _describe_own_files(work, ranks))

            def finish() -> None:
                if ranks.is_main:
                    _write_manifest(work, progress, files)
                    stack.close()

            _on_all_ranks(ranks, finish)
    except (CheckpointException, RuntimeError, OSError) as error:
        raise OSError(f"{target.name} could not be written: {_cause(error)}") from error
    return target


def _write_manifest(work: Path, progress: Progress, files_of_ranks: list[dict[str, Any]]) -> None:
    (work / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    files = {name: described for files in files_of_ranks for name, described in files.items()}
    files["progress.json"] = _describe(work / "progress.json")
    (work / "manifest.json").write_text(json.dumps(dict(sorted(files.items())), indent=1), encoding="utf-8")


def load_weights(path: Path, model: Transformer, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Load a checkpoint's weights into a model; each process loads its shard.

    Raises:
        DamagedCheckpoint: its files differ from what was written.
        MoelmError: it belongs to a model of another shape.
    """
    verify(path, ranks)
    _check_shapes(path, model)
    state = {"model": get_model_state_dict(model)}
    _load(path, state, ranks)
    set_model_state_dict(model, state["model"])


def load_training(path: Path, model: Transformer, optimizer: Optimizer, ranks: Ranks = SINGLE_PROCESS) -> Progress:
    """Load a checkpoint into model and optimizer; each process loads its shard.

    A checkpoint of an imported or upcycled run (`origin` in its progress) has weights only; the optimizer state is then
    unchanged.

    Returns:
        The progress of the run at the checkpoint.

    Raises:
        DamagedCheckpoint: its files differ from what was written.
        MoelmError: it belongs to a model of another shape.
    """
    load_weights(path, model, ranks)
    progress = read_progress(path)
    if "origin" not in progress:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _load(path, state, ranks)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return progress


def load_newest(paths: Sequence[Path], model: Transformer, optimizer: Optimizer, ranks: Ranks) -> Progress | None:
    """Load the newest intact one of some checkpoints, with a warning for each damaged one; None if there is none.

    Args:
        paths: oldest first; the same on every process.
    """
    for path in reversed(paths):
        try:
            return load_training(path, model, optimizer, ranks)
        except DamagedCheckpoint as error:
            warn(f"{error} Falling back to the previous one.")
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights by parameter name, in the dtypes in which they are stored.

    Raises:
        DamagedCheckpoint: its files differ from what was written.
    """
    verify(path)
    weights = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in _stored(path).items()}
    state: State = {"model": weights}
    _load(path, state, SINGLE_PROCESS)
    return weights


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every weight by parameter name."""
    described = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key.removeprefix("model."): about
        for key, about in described.items()
        if key.startswith("model.") and isinstance(about, TensorStorageMetadata)
    }


def _check_shapes(path: Path, model: Transformer) -> None:
    stored = {name: tuple(about.size) for name, about in _stored(path).items()}
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise MoelmError(
                f"The checkpoint {path} belongs to another model: {name} is {stored.get(name, 'missing')} there and "
                f"{expected.get(name, 'missing')} here."
            )


def _load(path: Path, state: State, ranks: Ranks) -> None:
    try:
        with _no_single_process_warning():
            load(state, checkpoint_id=path, no_dist=ranks.size == 1)
    except CheckpointException as error:
        cause = _cause(error)
        if cause.startswith("Missing key"):  # its files are intact
            raise MoelmError(
                f"The checkpoint {path} has no state for this optimizer; another version of moelm has written it."
            ) from error
        raise DamagedCheckpoint(f"The checkpoint {path} is damaged: {cause}.") from error


def read_progress(path: Path) -> Progress:
    """The progress of the run at this checkpoint.

    Raises:
        DamagedCheckpoint: it is not readable.
    """
    try:
        progress: Progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        if not fresh_progress().keys() <= progress.keys() or not isinstance(progress["val_loss"], float | None):
            raise ValueError
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise DamagedCheckpoint(f"The checkpoint {path} is damaged: its progress.json is missing or unreadable.") from None
    return progress


def verify(path: Path, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Verify every file against the manifest; the processes share the work.

    Raises:
        DamagedCheckpoint: on every process, naming the checkpoint and the file.
    """
    for problem in ranks.gather(_damage(path, ranks)):
        if problem is not None:
            raise DamagedCheckpoint(f"The checkpoint {path} is damaged: {problem}.")


def _damage(path: Path, ranks: Ranks) -> str | None:
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "its manifest.json is missing or unreadable"
    if not isinstance(files, dict):
        return "its manifest.json lists no files"
    present = {file.name for file in path.iterdir()}
    if missing := sorted(files.keys() - present):
        return f"{missing[0]} is missing"
    unlisted = present - files.keys()
    if unlisted := {name for name in unlisted if name in (".metadata", "progress.json") or name.startswith("__")}:
        return f"its manifest.json does not list {min(unlisted)}"
    for name, described in list(files.items())[ranks.rank :: ranks.size]:
        try:
            if _describe(path / name) != described:
                return f"{name} differs from what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints whose writing was interrupted."""
    remove_temporary(folder, PREFIX)


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Delete all checkpoints but the `keep` newest, the one with the best validation loss, and the one at step 0 of an
    imported or upcycled run.

    Args:
        newest: the one just saved. Later ones are deleted too: they were damaged when the run resumed from an earlier one.
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
            loss = read_progress(path)["val_loss"]
        except DamagedCheckpoint:
            continue  # loading it would report that
        if loss is not None:
            scored.append((loss, path))
    return min(scored)[1] if scored else None


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """Suppress torch's warning that torch.distributed is not initialized."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _on_all_ranks(ranks: Ranks, function: Callable[[], T]) -> list[T]:
    """Call a function on every process and return all results; if it fails on one, raise on all of them."""
    done: T | None = None
    failure: str | None = None
    try:
        done = function()
    except OSError as error:
        failure = error.strerror or str(error)
    results = ranks.gather((done, failure), ranks.checkpoint_group)
    for _, found in results:
        if found is not None:
            raise OSError(found)
    return [cast(T, result) for result, _ in results]


def _describe_own_files(work: Path, ranks: Ranks) -> dict[str, Any]:
    """Size and checksum of the files that this process has written."""
    own = sorted(work.glob(f"__{ranks.rank}_*"))
    return {path.name: _describe(path) for path in own + ([work / ".metadata"] if ranks.is_main else [])}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _cause(error: BaseException) -> str:
    """The reason of a failure; torch's writer raises errors of its own while it handles a full disk's."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    chained: BaseException | None = error
    while chained is not None:
        if isinstance(chained, OSError) and chained.strerror:
            return chained.strerror
        chained = chained.__cause__ or chained.__context__
    return first_line(error)
