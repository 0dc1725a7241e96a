"""Checkpoints on a disk that is full, and damaged manifests."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from moelm.config import OptimConfig
from moelm.errors import MoelmError
from moelm.runs.checkpoint import (
    DamagedCheckpoint,
    best_checkpoint,
    fresh_progress,
    list_checkpoints,
    load_training,
    read_weights,
    save_checkpoint,
    training_state,
)
from moelm.train.optimizer import build_optimizer
from tests.mutations import count_accepted, mutated_files
from tests.train.test_optimizer import small_model


class FullDisk:
    """A stream to a disk with space for a few bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        if self._stream.tell() + len(data) > 600:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_the_reason_is_named_and_nothing_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_stream = FileSystem.create_stream

    @contextmanager
    def create_full(self: FileSystem, path: Path, mode: str) -> Iterator[Any]:
        with create_stream(self, path, mode) as stream:
            yield FullDisk(stream)

    monkeypatch.setattr(FileSystem, "create_stream", create_full)
    with pytest.raises(OSError, match="step-00000000 could not be written: No space left on device"):
        save_checkpoint(tmp_path, {"model": {"w": torch.zeros(1000)}}, fresh_progress())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
def test_damaged_files_are_named_or_change_nothing(tmp_path: Path, name: str) -> None:
    weight = torch.arange(8.0)
    path = save_checkpoint(tmp_path, {"model": {"w": weight}}, {**fresh_progress(), "val_loss": 2.0})
    valid = json.loads((path / name).read_bytes())

    def read(content: bytes) -> None:
        (path / name).write_bytes(content)
        best_checkpoint(tmp_path)
        assert torch.equal(read_weights(path)["w"], weight)

    accepted, refused = count_accepted(mutated_files([valid], 300, lambda tree: json.dumps(tree).encode()), read)
    assert refused > 250
    assert accepted + refused == 300


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"model": {"w": torch.zeros(8)}}, fresh_progress())
    (path / "note.txt").touch()  # not of the checkpoint
    read_weights(path)
    shutil.copy(path / "__0_0.distcp", path / "__1_0.distcp")
    with pytest.raises(MoelmError, match=r"does not list __1_0\.distcp"):
        read_weights(path)
    assert list_checkpoints(tmp_path) == [path]


def test_a_checkpoint_of_another_optimizer_is_not_called_damaged(tmp_path: Path) -> None:
    """As one of another version, whose optimizer has stored other values."""
    model = small_model()
    adamw, muon = (build_optimizer(model, OptimConfig(kind=kind, lr=0.01), torch.float32) for kind in ("adamw", "muon"))
    path = save_checkpoint(tmp_path, training_state(model, adamw), {**fresh_progress(), "step": 1})
    load_training(path, model, adamw)
    with pytest.raises(MoelmError, match="has no state for this optimizer; another version of moelm has written") as error:
        load_training(path, model, muon)
    assert not isinstance(error.value, DamagedCheckpoint)
