"""Dense runs made sparse: the same function at first, copies that part as asked, and training that goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import load_config
from moelm.errors import MoelmError
from moelm.interop.upcycle import upcycle_run
from moelm.model import Transformer
from moelm.model.experts import Experts, experts_of
from moelm.rundir import RunDirectory, load_run
from moelm.train.launch import train
from tests.conftest import Moelm


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished dense and a finished sparse run of its own."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(64).view(2, 32)).logits


def layers(run: str) -> list[Experts]:
    return experts_of(load_run(run)[0].requires_grad_(False))


@pytest.mark.parametrize("router", [[], ["model.ffn.router.kind=noisy_topk"], ["model.ffn.router.kind=sigmoid"]])
@pytest.mark.usefixtures("here")
def test_gates_that_sum_to_one_give_the_dense_models_logits(router: list[str]) -> None:
    upcycle_run("tiny-dense", "sparse", 5, 3, overrides=router)
    dense, sparse = load_run("tiny-dense")[0], load_run("sparse")[0]
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0, atol=2e-6)
    for layer, block in zip(experts_of(sparse), dense.blocks, strict=True):
        assert torch.equal(layer.w2, block.ffn.w2.expand_as(layer.w2))


@pytest.mark.usefixtures("here")
def test_the_router_is_fresh_and_follows_the_seed() -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        upcycle_run("tiny-dense", name, 8, 2, overrides=[f"seed={seed}"])
    one, two, three = (load_run(name)[0].state_dict()["layers.1.ffn.router.weight"] for name in ("one", "two", "three"))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert float(one.std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.usefixtures("here")
def test_noise_has_the_size_asked_for() -> None:
    upcycle_run("tiny-dense", "sparse", 4, 2, noise=0.1)
    dense = load_run("tiny-dense")[0].requires_grad_(False).blocks[0].ffn.w1
    apart = layers("sparse")[0].w1 - dense
    assert float(apart.std() / dense.std()) == pytest.approx(0.1, rel=0.1)
    assert abs(float(torch.corrcoef(apart.flatten(1))[0, 1])) < 0.2


@pytest.mark.usefixtures("here")
def test_hidden_units_are_drawn_anew_together_and_keep_their_statistics() -> None:
    upcycle_run("tiny-dense", "sparse", 4, 2, reinit=0.5)
    dense = load_run("tiny-dense")[0].requires_grad_(False).blocks[0].ffn
    layer = layers("sparse")[0]
    changed = (layer.w1 != dense.w1).all(dim=2)
    assert changed.sum(dim=1).tolist() == [16] * 4
    assert torch.equal(changed, (layer.w3 != dense.w3).all(dim=2))
    assert torch.equal(changed, (layer.w2 != dense.w2).all(dim=1))
    assert torch.equal(changed, (layer.w1 != dense.w1).any(dim=2))
    assert len({tuple(row.tolist()) for row in changed}) == 4
    for new, old in ((layer.w1, dense.w1), (layer.w2.transpose(1, 2), dense.w2.T), (layer.w3, dense.w3)):
        drawn = torch.cat([new[expert][changed[expert]] for expert in range(4)])
        were = torch.cat([old[changed[expert]] for expert in range(4)])
        assert float(drawn.std() / were.std()) == pytest.approx(1, rel=0.1)
        assert float((drawn.mean() - were.mean()) / were.std()) == pytest.approx(0, abs=0.1)


@pytest.mark.usefixtures("here")
def test_training_goes_on_where_the_dense_run_stood() -> None:
    run = upcycle_run("tiny-dense", "sparse", 4, 2, checkpoint="6", overrides=["train.steps=4"])
    lines = Path("runs/tiny-dense/metrics.jsonl").read_text().splitlines()
    dense_loss = json.loads(lines[6])["train/loss"]
    train(load_config(run.config, ["name=more", "optim.lr=1e-4"]), RunDirectory(Path("runs/more")))
    first = json.loads(Path("runs/more/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(dense_loss, abs=0.15)


@pytest.mark.parametrize(
    ("old", "new", "options", "told"),
    [
        ("tiny-moe", "new", {}, "is a mixture of experts already"),
        ("tiny-dense", "tiny-moe", {}, "exists already"),
        ("tiny-dense", "new", {"overrides": ["model.ffn.num_experts=3"]}, "cannot be chosen here"),
        ("tiny-dense", "new", {"overrides": ["model.num_layers=1"]}, "cannot be chosen here"),
        ("tiny-dense", "new", {"overrides": ["name=x"]}, "cannot be chosen here"),
        ("tiny-dense", "new", {"noise": float("inf")}, "noise is inf"),
        ("tiny-dense", "new", {"reinit": 0.01}, "reinit is 0.01, less than one of 32"),
        ("tiny-dense", "new", {"top_k": 9}, "top_k"),
        ("tiny-dense", "new", {"checkpoint": "5"}, "no checkpoint '5'"),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(
    here: Path, old: str, new: str, options: dict[str, Any], told: str
) -> None:
    before = sorted((here / "runs").iterdir())
    with pytest.raises(MoelmError, match=told):
        upcycle_run(old, new, **{"num_experts": 8, "top_k": 2, **options})
    assert sorted((here / "runs").iterdir()) == before


@pytest.mark.slow
def test_the_command_tells_how_to_go_on(moelm: Moelm, here: Path) -> None:
    done = moelm("upcycle", "tiny-dense", "new", "--num-experts", "4", "--noise", "0.01", cwd=here)
    assert "runs/new: `moelm train runs/new/config.yaml name=...`" in done.stdout, done.stderr
