"""Training with every router: equal losses however a batch is divided, and after a resume."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch

from moelm.errors import MoelmError
from moelm.inference.generate import Sampling, generate_text
from moelm.runs.load import load_run
from tests.conftest import largest_deviation, losses_by_step, metrics_lines, train_here
from tests.tolerance import assert_close

SETTINGS = {
    "topk": ["model.ffn.balance.aux=1.0", "model.ffn.balance.z=0.1"],
    "unnormalized": ["model.ffn.router.normalize=false"],
    "sequence": ["model.ffn.balance.scope=sequence"],
    "noisy": ["model.ffn.router.kind=noisy_topk"],
    "hierarchical": ["model.ffn.router={kind: hierarchical, groups: 2, group_k: 1}"],
    "topk-bias": ["model.ffn.balance.bias=0.01"],
    "sigmoid": ["model.ffn.router.kind=sigmoid", "model.ffn.balance.bias=0.01"],
    "shared": ["model.ffn.shared_experts=1"],
    "hash": ["model.ffn.router.kind=hash"],
    "random": ["model.ffn.router.kind=random"],
    "muon": ["optim.kind=muon", "optim.adamw.lr=0.002"],
}
BY_FORWARD_PASS = {
    "capacity": ["model.ffn.capacity_factor=0.75"],
    "expert_choice": ["model.ffn.router.kind=expert_choice"],
}
"""Settings with which the choice of experts depends on the other tokens of a forward pass, and so on the micro-batch."""


@pytest.mark.parametrize("name", [*SETTINGS, *BY_FORWARD_PASS])
def test_a_resumed_run_repeats_its_steps_exactly(workplace: Path, name: str) -> None:
    overrides = {**SETTINGS, **BY_FORWARD_PASS}[name]
    run = train_here(workplace, "moe", *overrides)
    before, losses_before = metrics_lines(run)[-1], losses_by_step(run)
    shutil.rmtree(run / "checkpoints/step-00000008")
    train_here(workplace, "moe", *overrides)
    after = metrics_lines(run)[-1]
    assert losses_by_step(run) == losses_before
    assert after["val/loss"] == before["val/loss"]
    assert after["moe/layers"] == before["moe/layers"]


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_do_not_change_the_trajectory(workplace: Path, name: str) -> None:
    one, four = (
        train_here(workplace, "moe", *SETTINGS[name], f"name=micro-{tokens}", f"train.micro_batch_tokens={tokens}")
        for tokens in (256, 64)
    )
    assert largest_deviation(four, one) < 5e-6  # 1e-7 to 1e-6 was measured


def test_the_share_of_dropped_assignments_is_logged(workplace: Path) -> None:
    lines = metrics_lines(train_here(workplace, "moe", *BY_FORWARD_PASS["capacity"]))
    assert all(0.25 <= line["moe/dropped"] < 0.75 for line in lines)


@pytest.mark.parametrize("name", ["sigmoid", "topk-bias"])
def test_the_bias_is_part_of_a_checkpoint(workplace: Path, name: str) -> None:
    train_here(workplace, "moe", *SETTINGS[name])
    with contextlib.chdir(workplace):
        model, _, _ = load_run("tiny-moe")
    bias = model.layers[0].ffn.router.bias
    assert bias.abs().max() > 0
    update = 0.01 / 4  # differences from the mean over four experts
    assert_close(bias, (bias / update).round() * update)  # whole updates
    assert_close(bias.sum(), torch.zeros(()), scale=float(bias.abs().max()))


@pytest.mark.parametrize("name", ["sigmoid", "topk-bias"])
def test_evaluation_does_not_change_the_bias(workplace: Path, name: str) -> None:
    run = train_here(workplace, "moe", *SETTINGS[name], "train.eval_every=8")
    train_here(workplace, "moe", *SETTINGS[name], "train.eval_every=1", "name=evaluated")
    with contextlib.chdir(workplace):
        rarely, often = (load_run(name)[0].layers[0].ffn.router.bias for name in (run.name, "evaluated"))
    assert torch.equal(rarely, often)


def test_expert_choice_warns_in_training_and_cannot_generate(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_here(workplace, "moe", *BY_FORWARD_PASS["expert_choice"])
    assert "leaks the future" in capfd.readouterr().err
    with contextlib.chdir(workplace):
        model, tokenizer, _ = load_run("tiny-moe")
    with pytest.raises(MoelmError, match="token by token"):
        generate_text(model, tokenizer, ["the cat"], Sampling())
