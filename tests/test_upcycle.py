"""Upcycled runs: the dense model's logits at first, noise and reinitialization of experts, further training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import load_config
from moelm.errors import MoelmError
from moelm.model import Transformer
from moelm.model.moe.experts import Experts, expert_stacks
from moelm.runs.directory import RunDirectory
from moelm.runs.load import load_run
from moelm.train.setup import train
from moelm.upcycle import upcycle_run
from tests.conftest import Moelm


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of a finished dense and a finished sparse run."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    return copy


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(64).view(2, 32)).logits


def load_experts(run: str) -> list[Experts]:
    return expert_stacks(load_run(run)[0].requires_grad_(False))


@pytest.mark.parametrize(
    "router", [[], ["model.ffn.router.kind=noisy_topk"], ["model.ffn.router.kind=sigmoid"], ["model.ffn.balance.bias=0.01"]]
)
@pytest.mark.usefixtures("folder")
def test_gates_that_sum_to_one_give_the_dense_models_logits(router: list[str]) -> None:
    upcycle_run("tiny-dense", "sparse", 5, 3, overrides=router)
    dense, sparse = load_run("tiny-dense")[0], load_run("sparse")[0]
    expected = logits(dense)
    torch.testing.assert_close(logits(sparse), expected, rtol=0, atol=4e-6 * float(expected.std()))
    for experts, block in zip(expert_stacks(sparse), dense.blocks, strict=True):
        assert torch.equal(experts.w2, block.ffn.w2.expand_as(experts.w2))


@pytest.mark.usefixtures("folder")
def test_the_router_is_initialized_from_the_seed() -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        upcycle_run("tiny-dense", name, 8, 2, overrides=[f"seed={seed}"])
    one, two, three = (load_run(name)[0].state_dict()["layers.1.ffn.router.weight"] for name in ("one", "two", "three"))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert float(one.std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.usefixtures("folder")
def test_noise_has_the_given_standard_deviation() -> None:
    upcycle_run("tiny-dense", "sparse", 4, 2, noise=0.1)
    dense = load_run("tiny-dense")[0].requires_grad_(False).blocks[0].ffn.w1
    noise = load_experts("sparse")[0].w1 - dense
    assert float(noise.std() / dense.std()) == pytest.approx(0.1, rel=0.1)
    assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1])) < 0.2


@pytest.mark.usefixtures("folder")
def test_reinitialized_units_are_the_same_in_all_matrices_and_have_the_old_statistics() -> None:
    upcycle_run("tiny-dense", "sparse", 4, 2, reinit=0.5)
    dense = load_run("tiny-dense")[0].requires_grad_(False).blocks[0].ffn
    experts = load_experts("sparse")[0]
    changed = (experts.w1 != dense.w1).all(dim=2)
    assert changed.sum(dim=1).tolist() == [16] * 4
    assert torch.equal(changed, (experts.w3 != dense.w3).all(dim=2))
    assert torch.equal(changed, (experts.w2 != dense.w2).all(dim=1))
    assert torch.equal(changed, (experts.w1 != dense.w1).any(dim=2))
    assert len({tuple(row.tolist()) for row in changed}) == 4
    for new, old in ((experts.w1, dense.w1), (experts.w2.transpose(1, 2), dense.w2.T), (experts.w3, dense.w3)):
        replacement = torch.cat([new[expert][changed[expert]] for expert in range(4)])
        replaced = torch.cat([old[changed[expert]] for expert in range(4)])
        assert float(replacement.std() / replaced.std()) == pytest.approx(1, rel=0.1)
        assert float((replacement.mean() - replaced.mean()) / replaced.std()) == pytest.approx(0, abs=0.1)


@pytest.mark.usefixtures("folder")
def test_training_begins_at_the_dense_runs_loss() -> None:
    run = upcycle_run("tiny-dense", "sparse", 4, 2, checkpoint="6", overrides=["train.steps=4"])
    lines = Path("runs/tiny-dense/metrics.jsonl").read_text().splitlines()
    dense_loss = json.loads(lines[6])["train/loss"]
    train(load_config(run.config, ["name=more", "optim.lr=1e-4"]), RunDirectory(Path("runs/more")))
    first = json.loads(Path("runs/more/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(dense_loss, rel=0.01)


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        ("tiny-moe", "new", {}, "is a mixture of experts already"),
        ("tiny-dense", "tiny-moe", {}, "exists already"),
        (
            "tiny-dense",
            "new",
            {"overrides": ["model.ffn.num_experts=3"]},
            "cannot be chosen, because the weights determine it",
        ),
        ("tiny-dense", "new", {"overrides": ["model.num_layers=1"]}, "cannot be chosen, because the weights determine it"),
        ("tiny-dense", "new", {"overrides": ["name=x"]}, "cannot be chosen, because the weights determine it"),
        ("tiny-dense", "new", {"noise": float("inf")}, "noise is inf"),
        ("tiny-dense", "new", {"reinit": 0.01}, "reinit is 0.01, less than one of 32"),
        ("tiny-dense", "new", {"top_k": 9}, "top_k"),
        ("tiny-dense", "new", {"checkpoint": "5"}, "no checkpoint '5'"),
    ],
)
def test_errors_leave_nothing(folder: Path, old: str, new: str, options: dict[str, Any], message: str) -> None:
    before = sorted((folder / "runs").iterdir())
    with pytest.raises(MoelmError, match=message):
        upcycle_run(old, new, **{"num_experts": 8, "top_k": 2, **options})
    assert sorted((folder / "runs").iterdir()) == before


@pytest.mark.slow
def test_the_command_prints_how_to_train_the_new_run(moelm: Moelm, folder: Path) -> None:
    done = moelm("upcycle", "tiny-dense", "new", "--num-experts", "4", "--noise", "0.01", cwd=folder)
    assert "runs/new: `moelm train runs/new/config.yaml name=...`" in done.stdout, done.stderr
