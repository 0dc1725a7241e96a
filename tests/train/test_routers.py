"""Every router in training: however a batch is cut, and after a resume, the same losses."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moelm.errors import MoelmError
from moelm.inference.generate import Sampling, generate_text
from moelm.runs.load import load_run
from tests.conftest import train_here

SETTINGS = {
    "unnormalised": ["model.ffn.router.normalize=false"],
    "sequence": ["model.ffn.balance.scope=sequence"],
    "noisy": ["model.ffn.router.kind=noisy_topk"],
    "hierarchical": ["model.ffn.router={kind: hierarchical, groups: 2, group_k: 1}"],
    "sigmoid": ["model.ffn.router.kind=sigmoid", "model.ffn.balance.bias=0.01"],
    "shared": ["model.ffn.shared_experts=1"],
    "hash": ["model.ffn.router.kind=hash"],
    "random": ["model.ffn.router.kind=random"],
}
BY_FORWARD_PASS = {
    "capacity": ["model.ffn.capacity_factor=0.75"],
    "expert_choice": ["model.ffn.router.kind=expert_choice"],
}
"""Those whose choice depends on the tokens of a forward pass, which a micro-batch is."""


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines(run)]


@pytest.mark.parametrize("name", [*SETTINGS, *BY_FORWARD_PASS])
def test_a_resumed_run_repeats_itself(workplace: Path, name: str) -> None:
    words = {**SETTINGS, **BY_FORWARD_PASS}[name]
    run = train_here(workplace, "moe", *words)
    before = lines(run)
    shutil.rmtree(run / "checkpoints/step-00000008")
    train_here(workplace, "moe", *words)
    after = lines(run)
    assert [line["train/loss"] for line in after] == [line["train/loss"] for line in before]
    assert after[-1]["val/loss"] == before[-1]["val/loss"]
    assert after[-1]["moe/layers"] == before[-1]["moe/layers"]


@pytest.mark.parametrize("name", SETTINGS)
def test_cutting_the_batch_changes_nothing(workplace: Path, name: str) -> None:
    whole, cut = (
        train_here(workplace, "moe", *SETTINGS[name], f"name=cut-{micro}", f"train.micro_batch_tokens={micro}")
        for micro in (256, 64)
    )
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    keys = ("aux_loss", "z_loss", "load_cv", "importance_cv", "entropy")
    for one, other in zip(lines(whole), lines(cut), strict=True):
        assert {key: other[f"moe/{key}"] for key in keys} == pytest.approx(
            {key: one[f"moe/{key}"] for key in keys}, rel=1e-4, abs=1e-6
        )


def test_dropped_tokens_are_told(workplace: Path) -> None:
    told = [line["moe/dropped"] for line in lines(train_here(workplace, "moe", *BY_FORWARD_PASS["capacity"]))]
    assert all(0.25 <= share < 0.75 for share in told)


def test_the_bias_is_part_of_a_checkpoint(workplace: Path) -> None:
    train_here(workplace, "moe", *SETTINGS["sigmoid"])
    with contextlib.chdir(workplace):
        model, _, _ = load_run("tiny-moe")
    bias = model.layers[0].ffn.router.bias
    assert bias.abs().max() > 0
    assert (bias / 0.01 - (bias / 0.01).round()).abs().max() < 1e-4  # whole steps


def test_experts_that_choose_leak_and_training_says_so(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_here(workplace, "moe", *BY_FORWARD_PASS["expert_choice"])
    assert "leaks the future" in capfd.readouterr().err
    with contextlib.chdir(workplace):
        model, tokenizer, _ = load_run("tiny-moe")
    with pytest.raises(MoelmError, match="token by token"):
        generate_text(model, tokenizer, ["the cat"], Sampling())
