"""Runs that begin with the weights of another."""

import json
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


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished dense and a finished sparse run of its own."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def fit(config: str, *words: str) -> Path:
    wanted = load_config(config, words)
    train(wanted, RunDirectory(Path("runs") / wanted.name))
    return Path("runs") / wanted.name


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("here")
def test_the_first_loss_is_the_other_runs_and_moments_are_fresh() -> None:
    run = fit("dense.yaml", "name=new", "init_from.run=tiny-dense", "optim.lr=1e-9", "train.steps=2")
    first = load_run("new")[0].state_dict()
    for name, weight in load_run("tiny-dense")[0].state_dict().items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)
    assert losses(run)[0] < losses(Path("runs/tiny-dense"))[0] - 0.5


@pytest.mark.parametrize("asked", ["init_from={run: tiny-dense}", "init_from={run: tiny-dense, checkpoint: best}"])
@pytest.mark.usefixtures("here")
def test_the_checkpoint_is_settled_when_the_run_begins(asked: str) -> None:
    """A run that was killed before it saved anything starts from the same weights, whatever the other has saved since."""
    words = ("name=new", asked, "train.steps=3", "train.checkpoint_every=100")
    run = fit("dense.yaml", *words)
    assert load_config(run / "config.yaml").init_from.checkpoint == "8"  # type: ignore[union-attr]
    before = losses(run)
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    shutil.copytree("runs/tiny-dense/checkpoints/step-00000006", "runs/tiny-dense/checkpoints/step-00000099")
    fit("dense.yaml", *words)
    assert losses(run) == before
    with pytest.raises(MoelmError, match=r"exists already with another init_from\.checkpoint"):
        fit("dense.yaml", *words, "init_from.checkpoint=6")


@pytest.mark.usefixtures("here")
def test_settings_that_make_the_weights_mean_something_else_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    fit("dense.yaml", "name=new", "init_from.run=tiny-dense", "train.steps=1", "model.rope_theta=500", "model.init_std=0.1")
    told = capsys.readouterr().err
    assert "model.rope_theta is 500.0 here, but the weights were trained with 10000.0 in runs/tiny-dense" in told
    assert "init_std" not in told


@pytest.mark.usefixtures("here")
def test_a_run_of_given_weights_keeps_their_tokenizer_and_settles_its_precision() -> None:
    run = upcycle_run("tiny-dense", "sparse", 4, 2, overrides=["data.tokenizer={kind: bpe, vocab_size: 258}"])
    before = run.tokenizer.read_bytes()
    with pytest.raises(MoelmError, match="belong to another tokenizer"):
        fit("runs/sparse/config.yaml")
    assert run.tokenizer.read_bytes() == before
    fit(str(upcycle_run("tiny-dense", "other", 4, 2, overrides=["train.precision=auto", "train.steps=2"]).config))
    assert load_config("runs/other/config.yaml").train.precision == pick_precision(pick_device())


@pytest.mark.usefixtures("here")
def test_a_run_whose_own_checkpoints_are_damaged_does_not_begin_anew() -> None:
    run = upcycle_run("tiny-dense", "sparse", 4, 2, overrides=["train.steps=4"])
    fit("runs/sparse/config.yaml")
    before = run.metrics.read_bytes()
    for path in list_checkpoints(run.checkpoints)[1:]:
        (path / "progress.json").write_text("{}")
    with pytest.raises(MoelmError, match="All checkpoints that runs/sparse has written are damaged"):
        fit("runs/sparse/config.yaml")
    assert run.metrics.read_bytes() == before
