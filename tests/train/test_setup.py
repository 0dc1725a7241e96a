"""Starting, resuming and stopping a run in this process, which is faster than the command line."""

import contextlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import moelm.cli.train
import moelm.runs.lock
import moelm.train.setup
import moelm.train.trainer
from moelm.cli.boundary import OutputClosed
from moelm.errors import MoelmError
from moelm.runs.checkpoint import best_checkpoint, list_checkpoints, read_progress
from moelm.runs.directory import RunDirectory
from moelm.runs.load import load_run
from moelm.runs.lock import RunLock
from tests.conftest import Moelm, losses_by_step, metrics_lines, train_here


def checkpoint_steps(run: Path) -> list[int]:
    return [read_progress(path)["step"] for path in list_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_losses_depend_on_the_seed_alone(trained: Path, workplace: Path, kind: str) -> None:
    run = train_here(workplace, kind)
    assert losses_by_step(run) == losses_by_step(trained / f"runs/tiny-{kind}")
    other = train_here(workplace, kind, "name=other", "seed=1")
    assert losses_by_step(other) != losses_by_step(run)


def test_a_directory_without_a_config_is_trained_from_initial_weights(trained: Path, workplace: Path) -> None:
    """config.yaml is written last, so that checkpoints beside none are not those of a run."""
    (train_here(workplace, "moe") / "config.yaml").unlink()
    assert losses_by_step(train_here(workplace, "moe")) == losses_by_step(trained / "runs/tiny-moe")


def test_deterministic_kernels_are_chosen_before_the_processes_connect(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL reads the choice when it is initialized."""
    calls: list[object] = []

    def connect(timeout_s: float) -> None:
        calls.append("connect")
        raise MoelmError("enough")

    monkeypatch.setattr(moelm.train.setup, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(moelm.train.setup, "use_deterministic_kernels", calls.append)
    monkeypatch.setattr(moelm.train.setup, "distributed_context", connect)
    for deterministic in ("false", "true"):
        with pytest.raises(MoelmError, match="enough"):
            train_here(workplace, "moe", f"train.deterministic={deterministic}")
    assert calls == ["connect", torch.device("cuda"), "connect"]


def test_a_dense_run_logs_no_routing_metrics(trained: Path) -> None:
    keys = metrics_lines(trained / "runs/tiny-dense")[-1].keys()
    assert {"train/loss", "train/grad_norm", "perf/mfu", "val/loss", "val/bpb"} <= keys
    assert not [key for key in keys if key.startswith("moe/")]


def test_the_newest_and_the_best_checkpoints_are_retained(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = moelm.train.trainer.evaluate
    losses = iter([5.0, 3.0, 4.0, 4.5])

    def evaluate_to_given_loss(*arguments: Any) -> Any:
        evaluation = evaluate(*arguments)
        return evaluation._replace(overall=evaluation.overall._replace(loss=next(losses)))

    monkeypatch.setattr(moelm.train.trainer, "evaluate", evaluate_to_given_loss)
    run = train_here(workplace, "moe", "train.eval_every=2", "train.keep_checkpoints=1")
    assert checkpoint_steps(run) == [4, 8]
    assert best_checkpoint(run / "checkpoints") == RunDirectory(run).checkpoint("best")
    assert RunDirectory(run).checkpoint("best").name == "step-00000004"
    with contextlib.chdir(workplace):
        load_run("tiny-moe", "best")
        load_run("tiny-moe", "8")


def test_a_flipped_bit_is_detected_and_the_damaged_checkpoint_is_deleted(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train_here(workplace, "dense", "train.checkpoint_every=3")
    before = losses_by_step(run)
    assert checkpoint_steps(run) == [6, 8]
    (weights,) = (run / "checkpoints/step-00000008").glob("*.distcp")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    train_here(workplace, "dense", "train.checkpoint_every=7", "train.keep_checkpoints=1")
    message = capfd.readouterr().err
    assert "step-00000008 is damaged" in message
    assert "from step 6" in message
    assert losses_by_step(run) == before
    assert checkpoint_steps(run) == [8]
    with contextlib.chdir(workplace):
        load_run("tiny-dense")


def test_a_run_with_damaged_checkpoints_only_is_refused_and_unchanged(workplace: Path) -> None:
    run = train_here(workplace, "dense", "train.steps=2")
    before = (run / "metrics.jsonl").read_bytes()
    for path in list_checkpoints(run / "checkpoints"):
        (path / "progress.json").write_text("{}")
    with pytest.raises(MoelmError, match=r"All checkpoints that .* has written are damaged"):
        train_here(workplace, "dense", "train.steps=2")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_last_good_checkpoint_is_the_one_before_the_diverged_step(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = moelm.train.trainer.learning_rate
    monkeypatch.setattr(
        moelm.train.trainer, "learning_rate", lambda step, *rest: 1e30 if step == 4 else schedule(step, *rest)
    )
    with pytest.raises(MoelmError) as caught:
        train_here(workplace, "dense", "train.checkpoint_every=1", "train.keep_checkpoints=3")
    # Step 5 makes the weights unusable and is saved; step 6 detects it.
    assert "at step 6; the last good checkpoint is" in str(caught.value)
    assert "step-00000004." in str(caught.value)
    assert checkpoint_steps(workplace / "runs/tiny-dense") == [3, 4, 5]


def test_a_second_training_of_the_same_name_writes_nothing(workplace: Path) -> None:
    with (
        RunLock(RunDirectory(workplace / "runs/tiny-dense")),
        pytest.raises(MoelmError, match="is being trained by process"),
    ):
        train_here(workplace, "dense")
    assert not (workplace / "runs").exists()
    train_here(workplace, "dense", "train.steps=2")
    assert not (workplace / "runs/tiny-dense/lock").exists()


def test_a_training_that_was_taken_over_ends_without_saving(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLock, "_new_owner", lambda self: "process 7 on elsewhere")
    monkeypatch.setattr(moelm.runs.lock, "BEAT_S", 0.01)
    with pytest.raises(MoelmError, match="has been taken over by process 7 on elsewhere"):
        train_here(workplace, "dense", "train.steps=100000", "train.checkpoint_every=100000")
    assert not checkpoint_steps(workplace / "runs/tiny-dense")


def test_an_ignored_hangup_does_not_stop_a_training(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    evaluate = moelm.train.trainer.evaluate

    def hang_up(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return evaluate(*arguments)

    monkeypatch.setattr(moelm.train.trainer, "evaluate", hang_up)
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with pytest.raises(MoelmError, match="Stopped by SIGHUP"):
            train_here(workplace, "dense", "name=other", "train.steps=12")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert checkpoint_steps(train_here(workplace, "dense"))[-1] == 8
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_closed_stdout_does_not_fail_a_finished_training(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(message: str) -> None:
        raise OutputClosed("Standard output is closed.")

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(typer, "echo", fail)
    moelm.cli.train.train(Path("dense.yaml"))


@pytest.mark.slow
def test_metrics_on_a_full_disk_are_an_error_of_one_sentence(moelm: Moelm, workplace: Path) -> None:
    run = train_here(workplace, "dense", "train.steps=2", "name=other")
    limit = (run / "tokenizer.json").stat().st_size + 1000

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = moelm("train", "dense.yaml", "train.steps=60", preexec_fn=limit_file_size)
    assert done.returncode == 2
    assert "metrics.jsonl cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
