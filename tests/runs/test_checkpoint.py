"""Checkpoints on a disk that is full."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from moelm.runs.checkpoint import fresh_progress, save_checkpoint


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
