"""Evaluation of a split: mean losses, domains, documents, and equal digits on any number of processes."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moelm.cli.app import main
from moelm.data.loader import IGNORE
from moelm.evaluation.losses import EVAL_TOKENS, Evaluation, evaluate
from moelm.runs.document_losses import load_document_losses
from moelm.runs.load import load_run, open_run
from tests.conftest import Moelm, fill, metrics_lines, open_data, train_here
from tests.processes import run_ranks

FLOAT64 = 1e-12
"""Relative tolerance of sums of float64 losses; the losses themselves are computed in float32."""


def evaluate_run(folder: Path, name: str, split: str = "val") -> Evaluation:
    with contextlib.chdir(folder):
        run = open_run(name, "last", split)
        return evaluate(run.model, run.rows, run.dtype)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_evaluation_equals_what_training_logged(trained: Path, kind: str) -> None:
    last = metrics_lines(trained / f"runs/tiny-{kind}")[-1]
    found = evaluate_run(trained, f"tiny-{kind}")
    assert (found.overall.loss, found.overall.bpb) == (last["val/loss"], last["val/bpb"])
    assert {name: domain.loss for name, domain in found.domains.items()} == {
        name: domain["loss"] for name, domain in last["val/domains"].items()
    }


def test_the_loss_is_the_mean_over_all_targets(trained: Path) -> None:
    with contextlib.chdir(trained):
        model, _, config = load_run("tiny-moe")
        rows = open_data(config).val
    batch = rows.batch(torch.arange(len(rows)).numpy())
    with torch.no_grad():
        logits = model(batch.tokens_BT).logits.double()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE)
    found = evaluate_run(trained, "tiny-moe")
    assert found.overall.loss == pytest.approx(float(expected), rel=4 * torch.finfo(torch.float32).eps)
    assert found.overall.tokens == int(batch.valid_N.sum())
    assert found.overall.perplexity == pytest.approx(math.exp(found.overall.loss), rel=FLOAT64)
    nats = found.overall.loss * found.overall.tokens
    assert found.overall.bpb == pytest.approx(nats / math.log(2) / found.overall.bytes, rel=FLOAT64)


def test_document_losses_add_up_and_are_saved_by_training(trained: Path) -> None:
    found = evaluate_run(trained, "tiny-moe")
    losses = found.documents
    assert losses.nats.sum() / losses.tokens.sum() == pytest.approx(found.overall.loss, rel=FLOAT64)
    assert len(losses.numbers) == len(set(losses.numbers.tolist()))
    saved, step = load_document_losses(trained / "runs/tiny-moe/documents.npz") or pytest.fail("no file")
    assert step == 8
    assert saved.nats.tolist() == losses.nats.tolist()
    assert saved.names == losses.names


def test_the_loss_does_not_depend_on_the_batch_size(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_batch = evaluate_run(trained, "tiny-moe").overall
    monkeypatch.setattr("moelm.evaluation.losses.EVAL_TOKENS", 100)
    many_batches = evaluate_run(trained, "tiny-moe").overall
    assert many_batches.loss == pytest.approx(one_batch.loss, rel=4 * torch.finfo(torch.float32).eps)
    assert many_batches[2:] == one_batch[2:]


def test_domains_add_up_to_the_overall_loss(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    lines = (folder / "text.txt").read_text().splitlines()
    (folder / "other.txt").write_text("\n".join(line.upper() for line in lines) + "\n")
    sources = (
        "data.sources=[{path: text.txt, documents: line, domain: low}, {path: other.txt, documents: line, domain: high}]"
    )
    train_here(folder, "moe", sources, "train.steps=2")
    found = evaluate_run(folder, "tiny-moe")
    domains = found.domains
    assert set(domains) == {"low", "high"}
    assert sum(domain.tokens for domain in domains.values()) == found.overall.tokens
    assert sum(domain.bytes for domain in domains.values()) == found.overall.bytes
    nats = sum(domain.loss * domain.tokens for domain in domains.values())
    assert nats == pytest.approx(found.overall.loss * found.overall.tokens, rel=FLOAT64)
    bits = sum(domain.bpb * domain.bytes for domain in domains.values())
    assert bits == pytest.approx(found.overall.bpb * found.overall.bytes, rel=FLOAT64)


def test_evaluation_restores_the_training_mode(trained: Path) -> None:
    with contextlib.chdir(trained):
        model, _, config = load_run("tiny-moe")
        rows = open_data(config).val
    for training in (True, False):
        model.train(training)
        evaluate(model, rows, torch.float32)
        assert model.training is training


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "train"])
def test_two_processes_give_equal_digits(moelm: Moelm, trained: Path, split: str) -> None:
    arguments = ["eval", "tiny-moe", "--split", split, "--json"]
    two = run_ranks(main, ["moelm", *arguments], trained, 2)
    assert two.returncode == 0, two.stderr
    found = json.loads(two.stdout)
    assert found == json.loads(moelm(*arguments, cwd=trained).stdout)
    in_process = evaluate_run(trained, "tiny-moe", split).as_dict()
    assert {key: found[key] for key in in_process} == in_process
    if split == "train":
        assert found["tokens"] > EVAL_TOKENS  # so that both processes had a batch
