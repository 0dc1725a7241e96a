"""Runs that start from the weights of another run."""

import shutil
from pathlib import Path

import pytest
import torch

from moelm.config import load_config
from moelm.errors import MoelmError
from moelm.hardware import pick_device, pick_precision
from moelm.runs.checkpoint import list_checkpoints
from moelm.runs.directory import RunDirectory
from moelm.runs.load import load_run
from moelm.train.setup import train
from moelm.upcycle import upcycle_run
from tests.conftest import losses_by_step


@pytest.fixture
def own_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder `trained` that the test may change; the current directory."""
    shutil.copytree(trained, tmp_path / "trained")
    monkeypatch.chdir(tmp_path / "trained")
    return tmp_path / "trained"


def train_run(path: str, *overrides: str) -> Path:
    """Train a config in the current directory; returns the run's directory."""
    config = load_config(path, overrides)
    train(config, RunDirectory(Path("runs") / config.name))
    return Path("runs") / config.name


@pytest.mark.usefixtures("own_folder")
def test_training_starts_from_the_given_weights() -> None:
    run = train_run("dense.yaml", "name=new", "init_from.run=tiny-dense", "optim.lr=1e-9", "train.steps=2")
    weights = load_run("new")[0].state_dict()
    for name, expected in load_run("tiny-dense")[0].state_dict().items():
        # Two steps of at most lr, and their rounding.
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-8)
    assert losses_by_step(run)[0][1] < losses_by_step(Path("runs/tiny-dense"))[0][1] - 0.5


@pytest.mark.parametrize("init_from", ["init_from={run: tiny-dense}", "init_from={run: tiny-dense, checkpoint: best}"])
@pytest.mark.usefixtures("own_folder")
def test_the_checkpoint_is_resolved_when_the_run_starts(init_from: str) -> None:
    """A run that was killed before its first checkpoint starts again from the same weights, not from newer ones."""
    overrides = ("name=new", init_from, "train.steps=3", "train.checkpoint_every=100")
    run = train_run("dense.yaml", *overrides)
    assert load_config(run / "config.yaml").init_from.checkpoint == "8"  # type: ignore[union-attr]
    before = losses_by_step(run)
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    shutil.copytree("runs/tiny-dense/checkpoints/step-00000006", "runs/tiny-dense/checkpoints/step-00000099")
    train_run("dense.yaml", *overrides)
    assert losses_by_step(run) == before
    with pytest.raises(MoelmError, match=r"exists already with another init_from\.checkpoint"):
        train_run("dense.yaml", *overrides, "init_from.checkpoint=6")


@pytest.mark.usefixtures("own_folder")
def test_settings_that_change_what_the_weights_compute_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    initial = ("model.init_std=0.1", "model.init_embedding_mean=0.1")
    train_run("dense.yaml", "name=new", "init_from.run=tiny-dense", "train.steps=1", "model.rope_theta=500", *initial)
    message = capsys.readouterr().err
    assert "model.rope_theta is 500.0 here, but the weights were trained with 10000.0 in runs/tiny-dense" in message
    assert "init_std" not in message
    assert "init_embedding_mean" not in message


@pytest.mark.usefixtures("own_folder")
def test_a_run_of_given_weights_requires_their_tokenizer_and_resolves_its_precision() -> None:
    run = upcycle_run("tiny-dense", "sparse", 4, 2, overrides=["data.tokenizer={kind: bpe, vocab_size: 258}"])
    before = run.tokenizer.read_bytes()
    with pytest.raises(MoelmError, match="belong to another tokenizer"):
        train_run("runs/sparse/config.yaml")
    assert run.tokenizer.read_bytes() == before
    train_run(str(upcycle_run("tiny-dense", "other", 4, 2, overrides=["train.precision=auto", "train.steps=2"]).config))
    assert load_config("runs/other/config.yaml").train.precision == pick_precision(pick_device())


@pytest.mark.usefixtures("own_folder")
def test_a_run_whose_own_checkpoints_are_damaged_does_not_restart_from_the_given_weights() -> None:
    run = upcycle_run("tiny-dense", "sparse", 4, 2, overrides=["train.steps=4"])
    train_run("runs/sparse/config.yaml")
    before = run.metrics.read_bytes()
    for path in list_checkpoints(run.checkpoints)[1:]:
        (path / "progress.json").write_text("{}")
    with pytest.raises(MoelmError, match="All checkpoints that runs/sparse has written are damaged"):
        train_run("runs/sparse/config.yaml")
    assert run.metrics.read_bytes() == before
