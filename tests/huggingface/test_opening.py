"""Directories in the Hugging Face format, evaluated and analyzed without a run: the figures of their import."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moelm.analyze.report import analyze_run
from moelm.config import load_config
from moelm.data.prepare import prepare
from moelm.errors import MoelmError
from moelm.evaluation.losses import evaluate
from moelm.huggingface.importing import import_model
from moelm.huggingface.opening import open_model
from tests.conftest import Moelm, fill
from tests.huggingface.hf_models import build_hf_model, save_hf_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models and a config of data."""
    monkeypatch.chdir(fill(tmp_path))
    for name in ("olmoe", "qwen2_moe-published"):
        save_hf_model(build_hf_model(name), tmp_path / name)
    data = {"sources": [{"path": "text.txt", "documents": "line"}], "seq_len": 32, "val_fraction": 0.2}
    config = {"data": data, "train": {"steps": 1, "batch_tokens": 32}, "optim": {"lr": 1e-3}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_losses_and_routing_are_those_of_the_import(folder: Path, moelm: Moelm) -> None:
    evaluated = moelm("eval", "olmoe", "--data", "data.yaml", "--json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    import_model(Path("olmoe"), "imported", config=Path("data.yaml"))
    prepare(load_config("runs/imported/config.yaml").data)
    imported = open_model("imported", "last", "val")
    expected = evaluate(imported.model, imported.rows, torch.float32)
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(expected.overall.loss, rel=1e-6)
    settings: dict[str, Any] = {"split": "val", "checkpoint": "last", "tokens": 2000, "permutations": 9, "seed": 0}
    settings |= {"ablate": "layers", "ablate_tokens": 500}
    reports = [
        analyze_run("olmoe", Path("one"), **settings, data=Path("data.yaml")),
        analyze_run("imported", Path("two"), **settings),
    ]
    assert reports[1] is not None
    assert reports[0] == {**reports[1], "run": "olmoe"}
    assert not Path("runs/olmoe").exists()


def test_a_model_is_computed_in_the_dtype_of_its_weights(folder: Path) -> None:
    full = open_model("qwen2_moe-published", "last", "val", Path("data.yaml"))
    save_hf_model(build_hf_model("qwen2_moe-published").bfloat16(), folder / "half")
    half = open_model("half", "last", "val", Path("data.yaml"))
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert half.dtype == torch.bfloat16
    losses = [evaluate(each.model, each.rows, each.dtype).overall.loss for each in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_errors_are_sentences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoelmError, match="a run has its own data"):
        open_model("imported", "last", "val", Path("data.yaml"))
    with pytest.raises(MoelmError, match=r"missing\.yaml"):
        open_model("olmoe", "last", "val", Path("missing.yaml"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MoelmError, match="which one process reads"):
        open_model("olmoe", "last", "val", Path("data.yaml"))
