"""Branched runs against the same runs trained from step 0."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moelm.config import load_config
from moelm.errors import MoelmError
from moelm.runs.checkpoint import list_checkpoints, read_weights, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.document_losses import load_document_losses
from moelm.train.branch import shared_steps
from moelm.train.setup import train
from tests.conftest import Moelm, metrics_lines, train_here

WSD = ("optim.schedule=wsd", "optim.decay_fraction=0.5", "train.checkpoint_every=2")
LONG = (*WSD, "name=long", "train.steps=20", "train.keep_checkpoints=20")
TIMES = ("time_s", "perf/")


@pytest.fixture
def long_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of 20 steps with all its checkpoints; the current directory."""
    train_here(workplace, "moe", *LONG)
    monkeypatch.chdir(workplace)
    return workplace


def branch(*overrides: str, source: str = "long") -> Path:
    config = load_config("moe.yaml", overrides)
    train(config, RunDirectory(Path("runs") / config.name), branch_from=source)
    return Path("runs") / config.name


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in metrics_lines(run)]


def assert_same_results(run: Path, expected: Path) -> None:
    assert without_times(run) == without_times(expected)
    paths = [list_checkpoints(each / "checkpoints")[-1] for each in (run, expected)]
    assert paths[0].name == paths[1].name
    weights, others = (read_weights(path) for path in paths)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    documents, other_documents = (load_document_losses(each / "documents.npz") for each in (run, expected))
    assert documents is not None
    assert other_documents is not None
    assert documents[1] == other_documents[1]
    assert documents[0].nats.tolist() == other_documents[0].nats.tolist()


def test_the_last_shared_step_is_the_last_before_either_decays(workplace: Path) -> None:
    """Of 10 steps after a warmup of 2, the last 4 decay: from step 6 (counted from 0) on, the rate is not the peak."""
    short = load_config(workplace / "moe.yaml", [*WSD, "train.steps=10"])
    long = load_config(workplace / "moe.yaml", [*WSD, "train.steps=20"])
    assert shared_steps(short, long) == shared_steps(long, short) == 7  # the rate of step 6 is the peak still
    constant = [load_config(workplace / "moe.yaml", ["optim.schedule=constant", f"train.steps={n}"]) for n in (5, 9)]
    assert shared_steps(*constant) == 5


def test_a_branch_is_the_run_trained_from_step_0(long_run: Path) -> None:
    settings = (*WSD, "train.steps=10")
    run = branch(*settings, "name=short")
    assert_same_results(run, train_here(long_run, "moe", *settings, "name=alone"))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["branched_from"] == {"run": "runs/long", "step": 6}
    shared = [line["time_s"] for line in metrics_lines(Path("runs/long"))][:6]
    times = [line["time_s"] for line in metrics_lines(run)]
    assert times[:6] == shared
    assert times == sorted(times)
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [8, 10]


def test_a_longer_run_branches_from_a_shorter_one_of_a_constant_rate(long_run: Path) -> None:
    settings = ("optim.schedule=constant", "train.checkpoint_every=5")
    train_here(long_run, "moe", *settings, "name=five", "train.steps=5")
    run = branch(*settings, "name=nine", "train.steps=9", "train.eval_every=5", source="runs/five")
    alone = train_here(long_run, "moe", *settings, "name=alone", "train.steps=9", "train.eval_every=5")
    assert without_times(run)[-1] == without_times(alone)[-1]


def test_a_branch_resumes_as_any_run(long_run: Path) -> None:
    settings = (*WSD, "train.steps=10")
    run = branch(*settings, "name=short")
    before = without_times(run)
    for path in list_checkpoints(run / "checkpoints")[1:]:
        (path / "progress.json").write_text("{}")
    branch(*settings, "name=short", source="missing")  # without effect
    assert without_times(run) == before
    for path in list_checkpoints(run / "checkpoints"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    branch(*settings, "name=short")
    assert without_times(run) == before


def test_a_damaged_checkpoint_is_left_out(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (long_run / "runs/long/checkpoints/step-00000006/progress.json").write_text("{}")
    run = branch(*WSD, "name=short", "train.steps=10")
    assert "step-00000006 is damaged" in capsys.readouterr().err
    assert json.loads((run / "environment.json").read_text())["branched_from"]["step"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.02", "seed=1"], "which has another optim.lr, seed; only train.steps and"),
        (["data.seq_len=16"], "which has another data.seq_len"),
        (["optim.schedule=cosine"], "optim.schedule is cosine, whose learning rate depends on train.steps"),
        (
            ["train.steps=3"],
            r"no checkpoint from step 1 to 2, .* \(its checkpoints are of steps 4, 8, .*smaller train.checkpoint_every",
        ),
    ],
)
def test_runs_that_share_no_trajectory_are_refused(long_run: Path, overrides: list[str], message: str) -> None:
    for step in (2, 6):
        for file in (long_run / f"runs/long/checkpoints/step-{step:08}").iterdir():
            file.unlink()
        (long_run / f"runs/long/checkpoints/step-{step:08}").rmdir()
    with pytest.raises(MoelmError, match=message):
        branch(*WSD, "name=short", "train.steps=10", *overrides)
    assert not (long_run / "runs/short").exists()


def test_a_missing_run_is_refused(long_run: Path) -> None:
    with pytest.raises(MoelmError, match="There is no run missing"):
        branch(*WSD, "name=short", "train.steps=10", source="missing")


@pytest.mark.slow(seconds=15)
def test_a_branch_on_several_processes(moelm: Moelm, long_run: Path) -> None:
    settings = (*WSD, "train.steps=10")
    done = moelm("train", "moe.yaml", *settings, "name=short", "--branch-from", "long", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "Branching from runs/long at step 6." in done.stderr
    alone = train_here(long_run, "moe", *settings, "name=alone")
    losses = [[line["train/loss"] for line in metrics_lines(run)] for run in (Path("runs/short"), alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][:6] == losses[1][:6]
