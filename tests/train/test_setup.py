"""Starting, going on and stopping, in this process: what the command line's tests would take too long for."""

import contextlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest

import moelm.train.trainer
from moelm.errors import MoelmError
from moelm.runs.checkpoint import best_checkpoint, list_checkpoints, read_progress
from moelm.runs.directory import RunDirectory
from moelm.runs.load import load_run
from tests.conftest import Moelm, train_here


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in lines(run)]


def steps(run: Path) -> list[int]:
    return [read_progress(path)["step"] for path in list_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_the_same_seed_gives_the_same_losses_and_another_does_not(trained: Path, workplace: Path, kind: str) -> None:
    run = train_here(workplace, kind)
    assert losses(run) == losses(trained / f"runs/tiny-{kind}")
    other = train_here(workplace, kind, "name=other", "seed=1")
    assert losses(other) != losses(run)


def test_a_dense_run_tells_nothing_of_routing(trained: Path) -> None:
    keys = lines(trained / "runs/tiny-dense")[-1].keys()
    assert {"train/loss", "train/grad_norm", "perf/mfu", "val/loss", "val/bpb"} <= keys
    assert not [key for key in keys if key.startswith("moe/")]


@pytest.mark.slow
def test_a_cut_batch_has_the_same_balance(workplace: Path) -> None:
    strong = ("model.ffn.balance.aux=1.0", "model.ffn.balance.z=0.1")
    whole, cut = (
        lines(train_here(workplace, "moe", *strong, f"name=micro-{micro}", f"train.micro_batch_tokens={micro}"))
        for micro in (256, 64)
    )
    for one, other in zip(whole, cut, strict=True):
        for key in ("train/loss", "moe/aux_loss", "moe/z_loss", "train/grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4 if key == "train/grad_norm" else 1e-5), key


def test_the_newest_checkpoints_and_the_best_are_kept(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moelm.train.trainer.evaluate
    told = iter([5.0, 3.0, 4.0, 4.5])

    def scripted(*arguments: Any) -> Any:
        found = real(*arguments)
        return found._replace(overall=found.overall._replace(loss=next(told)))

    monkeypatch.setattr(moelm.train.trainer, "evaluate", scripted)
    run = train_here(workplace, "moe", "train.eval_every=2", "train.keep_checkpoints=1")
    assert steps(run) == [4, 8]
    assert best_checkpoint(run / "checkpoints") == RunDirectory(run).checkpoint("best")
    assert RunDirectory(run).checkpoint("best").name == "step-00000004"
    with contextlib.chdir(workplace):
        load_run("tiny-moe", "best")
        load_run("tiny-moe", "8")


def test_a_flipped_bit_is_seen_and_the_damaged_one_outlives_nothing(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train_here(workplace, "dense", "train.checkpoint_every=3")
    before = losses(run)
    assert steps(run) == [6, 8]
    (weights,) = (run / "checkpoints/step-00000008").glob("*.distcp")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    train_here(workplace, "dense", "train.checkpoint_every=7", "train.keep_checkpoints=1")
    told = capfd.readouterr().err
    assert "step-00000008 is damaged" in told
    assert "from step 6" in told
    assert losses(run) == before
    assert steps(run) == [8]
    with contextlib.chdir(workplace):
        load_run("tiny-dense")


def test_all_damaged_is_a_sentence_and_changes_nothing(workplace: Path) -> None:
    run = train_here(workplace, "dense", "train.steps=2")
    before = (run / "metrics.jsonl").read_bytes()
    for path in list_checkpoints(run / "checkpoints"):
        (path / "progress.json").write_text("{}")
    with pytest.raises(MoelmError, match=r"All checkpoints that .* has written are damaged"):
        train_here(workplace, "dense", "train.steps=2")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_last_good_checkpoint_is_the_one_before_the_bad_step(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moelm.train.trainer.learning_rate
    monkeypatch.setattr(moelm.train.trainer, "learning_rate", lambda step, *rest: 1e30 if step == 4 else real(step, *rest))
    with pytest.raises(MoelmError) as caught:
        train_here(workplace, "dense", "train.checkpoint_every=1", "train.keep_checkpoints=3")
    # Step 5 ruins the weights and is saved; step 6 finds out.
    assert "at step 6; the last good checkpoint is" in str(caught.value)
    assert "step-00000004." in str(caught.value)
    assert steps(workplace / "runs/tiny-dense") == [3, 4, 5]


@pytest.mark.slow
def test_metrics_on_a_full_disk_are_a_sentence(moelm: Moelm, workplace: Path) -> None:
    run = train_here(workplace, "dense", "train.steps=2", "name=other")
    enough = (run / "tokenizer.json").stat().st_size + 1000

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (enough, enough))

    done = moelm("train", "dense.yaml", "train.steps=60", preexec_fn=no_large_files)
    assert done.returncode == 2
    assert "metrics.jsonl cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
