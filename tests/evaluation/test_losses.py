"""Evaluation: the same digits wherever and however it runs, and nothing in them but the next token."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import moelm.evaluation.losses
from moelm.data.loader import IGNORE, open_data
from moelm.evaluation.losses import Evaluation, evaluate
from moelm.runs.document_losses import load_document_losses
from moelm.runs.load import load_run, open_run
from tests.conftest import fill, train_here


def score(folder: Path, name: str, split: str = "val") -> Evaluation:
    with contextlib.chdir(folder):
        run = open_run(name, "last", split)
        return evaluate(run.model, run.rows, run.dtype)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_it_equals_what_training_logged(trained: Path, kind: str) -> None:
    last = json.loads((trained / f"runs/tiny-{kind}/metrics.jsonl").read_text().splitlines()[-1])
    found = score(trained, f"tiny-{kind}")
    assert (found.overall.loss, found.overall.bpb) == (last["val/loss"], last["val/bpb"])
    assert {name: domain.loss for name, domain in found.domains.items()} == {
        name: domain["loss"] for name, domain in last["val/domains"].items()
    }


def test_it_is_the_mean_over_every_target_and_nothing_else(trained: Path) -> None:
    with contextlib.chdir(trained):
        model, _, config = load_run("tiny-moe")
        rows = open_data(config).val
    batch = rows.batch(torch.arange(len(rows)).numpy())
    with torch.no_grad():
        logits = model(batch.tokens_BT).logits.double()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE)
    found = score(trained, "tiny-moe")
    assert found.overall.loss == pytest.approx(float(expected), rel=1e-6)
    assert found.overall.tokens == int(batch.valid_N.sum())
    assert found.overall.perplexity == pytest.approx(math.exp(found.overall.loss))
    nats = found.overall.loss * found.overall.tokens
    assert found.overall.bpb == pytest.approx(nats / math.log(2) / found.overall.bytes)


def test_documents_add_up_to_the_whole_and_are_kept_by_training(trained: Path) -> None:
    found = score(trained, "tiny-moe")
    losses = found.documents
    assert losses.nats.sum() / losses.tokens.sum() == pytest.approx(found.overall.loss, rel=1e-12)
    assert len(losses.numbers) == len(set(losses.numbers.tolist()))
    kept, step = load_document_losses(trained / "runs/tiny-moe/documents.npz") or pytest.fail("no file")
    assert step == 8
    assert kept.nats.tolist() == losses.nats.tolist()
    assert kept.names == losses.names


def test_the_size_of_its_batches_hardly_shows(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(trained, "tiny-moe").overall
    monkeypatch.setattr(moelm.evaluation.losses, "EVAL_TOKENS", 100)
    cut = score(trained, "tiny-moe").overall
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut[2:] == whole[2:]


def test_domains_add_up_to_the_whole(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    lines = (folder / "text.txt").read_text().splitlines()
    (folder / "other.txt").write_text("\n".join(line.upper() for line in lines) + "\n")
    sources = (
        "data.sources=[{path: text.txt, documents: line, domain: low}, {path: other.txt, documents: line, domain: high}]"
    )
    train_here(folder, "moe", sources, "train.steps=2")
    found = score(folder, "tiny-moe")
    domains = found.domains
    assert set(domains) == {"low", "high"}
    assert sum(domain.tokens for domain in domains.values()) == found.overall.tokens
    assert sum(domain.bytes for domain in domains.values()) == found.overall.bytes
    nats = sum(domain.loss * domain.tokens for domain in domains.values())
    assert nats == pytest.approx(found.overall.loss * found.overall.tokens, rel=1e-12)
    bits = sum(domain.bpb * domain.bytes for domain in domains.values())
    assert bits == pytest.approx(found.overall.bpb * found.overall.bytes, rel=1e-12)


def test_it_leaves_the_mode_of_the_model_alone(trained: Path) -> None:
    with contextlib.chdir(trained):
        model, _, config = load_run("tiny-moe")
        rows = open_data(config).val
    for training in (True, False):
        model.train(training)
        evaluate(model, rows, torch.float32)
        assert model.training is training


@pytest.mark.slow
def test_two_processes_find_the_same_digits(trained: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moelm"]
    done = subprocess.run(
        [sys.executable, *launch, "eval", "tiny-moe", "--split", "train", "--json"],
        cwd=trained,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    one = score(trained, "tiny-moe", "train")
    assert one.overall.tokens > moelm.evaluation.losses.EVAL_TOKENS  # so that both had something to do
    assert {key: two[key] for key in one.as_dict()} == one.as_dict()
