"""Batches of steps on one process, and those that a thread reads ahead."""

import threading
from pathlib import Path

import pytest
import torch

from moelm.config import RunConfig, load_config
from moelm.data.loader import Rows, open_folder
from moelm.data.prepare import prepare
from moelm.distributed.ranks import Ranks
from moelm.train.batches import StepBatch, StepBatches

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def config(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(workplace)
    return load_config(workplace / "moe.yaml", ["train.batch_tokens=256", "train.micro_batch_tokens=64"])


@pytest.fixture
def rows(config: RunConfig) -> Rows:
    return open_folder(config, prepare(config.data)[0]).train


def equal(first: StepBatch, second: StepBatch) -> bool:
    def tensors(step: StepBatch) -> list[torch.Tensor]:
        return [tensor for batch, keys_B in step.micro_batches for tensor in (*batch, keys_B)]

    same = all(map(torch.equal, tensors(first), tensors(second)))
    return same and len(tensors(first)) == len(tensors(second)) and first.num_valid_tokens == second.num_valid_tokens


def test_processes_share_a_step(config: RunConfig, rows: Rows) -> None:
    whole = StepBatches(rows, config, Ranks(0, 1), CPU)[3]
    parts = [StepBatches(rows, config, Ranks(rank, 2), CPU)[3] for rank in range(2)]
    assert [len(part.micro_batches) for part in (whole, *parts)] == [4, 2, 2]
    assert equal(whole, StepBatch([each for part in parts for each in part.micro_batches], parts[0].num_valid_tokens))
    assert whole.num_valid_tokens == sum(int(batch.valid_BT.sum()) for batch, _ in whole.micro_batches)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Steps that were read, with the thread's name. Copies to the GPU are left out."""
    reads: list[tuple[int, str]] = []
    read = StepBatches._read

    def record(self: StepBatches, step: int) -> StepBatch:
        reads.append((step, threading.current_thread().name))
        return read(self, step)

    monkeypatch.setattr(StepBatches, "_read", record)
    monkeypatch.setattr(StepBatches, "_to_device", lambda self, step: step)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return reads


def test_the_next_step_is_read_ahead_for_a_gpu(config: RunConfig, rows: Rows, reads: list[tuple[int, str]]) -> None:
    expected = StepBatches(rows, config, Ranks(0, 1), CPU)
    batches = StepBatches(rows, config, Ranks(0, 1), GPU)
    steps = [5, 6, 7, 2]  # 2 was not read ahead
    assert all(equal(batches[step], expected[step]) for step in steps)
    batches.close()
    assert [step for step, thread in reads if thread == "batches_0"][:5] == [5, 6, 7, 8, 2]
    assert [step for step, thread in reads if thread == "MainThread"] == steps


def test_an_error_of_reading_ahead_is_raised(
    config: RunConfig, rows: Rows, reads: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = StepBatches(rows, config, Ranks(0, 1), GPU)
    assert batches[0].num_valid_tokens > 0
    assert batches._next is not None
    batches._next[1].result()

    def fail(offsets: object) -> None:
        raise OSError("the file system is gone")

    monkeypatch.setattr(rows.split, "take", fail)
    assert batches[1].num_valid_tokens > 0, "it was read before"
    with pytest.raises(OSError, match="the file system is gone"):
        batches[2]
    batches.close()
