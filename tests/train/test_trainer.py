"""Training as its user meets it: the real command, real files, real signals."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelm.config import load_config
from tests.conftest import Moelm, train_here

CONTRACT = {"step", "tokens", "flops", "time_s", "train/loss", "train/lr", "train/grad_norm"}
CONTRACT |= {"perf/tokens_per_s", "perf/mfu"}
ROUTING = {"load_max_over_mean", "load_cv", "importance_cv", "entropy", "dead_experts", "aux_loss", "z_loss"}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in lines(run)]


def test_a_run_leaves_what_the_contract_says(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml")
    assert done.returncode == 0, done.stderr
    assert "The data has been prepared in" in done.stderr
    run = workplace / "runs/tiny-moe"
    written = {path.name for path in run.iterdir()}
    assert written == {"config.yaml", "environment.json", "metrics.jsonl", "documents.npz", "tokenizer.json", "checkpoints"}
    told = lines(run)
    assert [line["step"] for line in told] == list(range(1, 9))
    assert all(line.keys() >= CONTRACT | {f"moe/{name}" for name in ROUTING} | {"moe/layers"} for line in told)
    assert [line["step"] for line in told if "val/loss" in line] == [4, 8]
    assert told[-1]["tokens"] == 8 * 256
    assert told[-1]["train/loss"] < told[0]["train/loss"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-2:] == ["step-00000006", "step-00000008"]

    scored = moelm("eval", "tiny-moe", "--json")
    assert json.loads(scored.stdout)["loss"] == told[-1]["val/loss"]
    assert json.loads(scored.stdout)["bpb"] == told[-1]["val/bpb"]

    taken = moelm("train", "moe.yaml", "optim.lr=0.02")
    assert (taken.returncode, taken.stderr.count("\n")) == (2, 1)
    assert "optim.lr" in taken.stderr
    assert "name=" in taken.stderr
    assert moelm("train", "moe.yaml", "--resume", "never").returncode == 2


def test_micro_batches_change_nothing(moelm: Moelm, workplace: Path) -> None:
    for name, micro in (("whole", 256), ("cut", 64)):
        assert moelm("train", "moe.yaml", f"name={name}", f"train.micro_batch_tokens={micro}").returncode == 0
    whole, cut = (lines(workplace / f"runs/{name}") for name in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["moe/aux_loss"] == pytest.approx(b["moe/aux_loss"], rel=1e-4)


def kill_and_resume(moelm: Moelm, workplace: Path, steps: int, kills: int) -> None:
    words = ["train", "moe.yaml", f"train.steps={steps}", "train.checkpoint_every=7", "train.eval_every=50"]
    assert moelm(*words, "name=straight").returncode == 0
    killed = workplace / "runs/killed/metrics.jsonl"
    chance = random.Random(0)
    for _ in range(kills):
        known = killed.read_text().count("\n") if killed.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "moelm", *words, "name=killed"], cwd=workplace, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        goal = known + chance.randint(1, max(1, steps // (kills + 1)))
        while time.monotonic() < until and process.poll() is None:
            if killed.exists() and killed.read_text().count("\n") >= goal:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = moelm(*words, "name=killed")
    assert done.returncode == 0, done.stderr
    assert losses(workplace / "runs/killed") == losses(workplace / "runs/straight")
    assert lines(workplace / "runs/killed")[-1]["val/loss"] == lines(workplace / "runs/straight")[-1]["val/loss"]


def test_a_killed_run_goes_on_exactly(moelm: Moelm, workplace: Path) -> None:
    kill_and_resume(moelm, workplace, steps=40, kills=1)


@pytest.mark.slow
def test_five_kills_in_200_steps_change_nothing(moelm: Moelm, workplace: Path) -> None:
    kill_and_resume(moelm, workplace, steps=200, kills=5)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_signal_saves_and_says_how_to_go_on(moelm: Moelm, workplace: Path, signum: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moelm", "train", "moe.yaml", "train.steps=5000"],
        cwd=workplace,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = workplace / "runs/tiny-moe/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signum)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "same command" in told
    assert "Traceback" not in told
    last = sorted((workplace / "runs/tiny-moe/checkpoints").iterdir())[-1].name
    assert int(last.removeprefix("step-")) == lines(workplace / "runs/tiny-moe")[-1]["step"]


def test_a_loss_that_is_no_number_stops_before_it_is_saved(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml", "optim.lr=1e30", "train.checkpoint_every=1")
    assert done.returncode == 2
    assert "at step" in done.stderr
    assert "good checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(moelm: Moelm, workplace: Path) -> None:
    assert moelm("train", "moe.yaml").returncode == 0
    before = losses(workplace / "runs/tiny-moe")
    saved = sorted((workplace / "runs/tiny-moe/checkpoints").iterdir())
    newest = saved[-1] / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-10])
    scored = moelm("eval", "tiny-moe")
    assert (scored.returncode, scored.stderr.count("\n")) == (2, 1)
    assert "step-00000008" in scored.stderr
    again = moelm("train", "moe.yaml")
    assert again.returncode == 0
    assert "step-00000008 is damaged" in again.stderr
    assert "step 6" in again.stderr
    assert losses(workplace / "runs/tiny-moe") == before
    for path in (workplace / "runs/tiny-moe/checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert moelm("train", "moe.yaml").returncode == 2


def test_a_full_disk_leaves_the_previous_checkpoint_whole(moelm: Moelm, workplace: Path) -> None:
    assert moelm("train", "moe.yaml", "train.steps=4", "name=full").returncode == 0
    source = workplace / "runs/full"
    shutil.copytree(source, workplace / "runs/tiny-moe")
    saved = workplace / "runs/tiny-moe/config.yaml"
    saved.write_text(saved.read_text().replace("steps: 4", "steps: 8"))

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = moelm("train", "moe.yaml", preexec_fn=no_large_files)
    assert done.returncode == 2, done.stderr
    assert "Warning: The checkpoint of step 6 could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    kept = sorted(path.name for path in (workplace / "runs/tiny-moe/checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert moelm("eval", "tiny-moe").returncode == 0


def test_wandb_offline_writes_our_figures(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "dense.yaml", "wandb.mode=offline")
    assert done.returncode == 0, done.stderr
    (path,) = (workplace / "runs/tiny-dense").glob("wandb/offline-run-*/*.wandb")
    written = path.read_bytes()
    assert b"train/loss" in written
    for _, loss in losses(workplace / "runs/tiny-dense"):
        assert str(loss).encode() in written


def test_wandb_online_without_a_login_is_a_sentence(moelm: Moelm, workplace: Path) -> None:
    nobody = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = moelm("train", "dense.yaml", "wandb.mode=online", env={**nobody, "HOME": str(workplace)})
    assert done.returncode == 2
    assert "wandb.mode is online" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_evaluate_to_the_same_digits(moelm: Moelm, workplace: Path) -> None:
    assert moelm("train", "moe.yaml").returncode == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moelm"]
    two = subprocess.run(
        [sys.executable, *launch, "eval", "tiny-moe", "--json"],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout) == json.loads(moelm("eval", "tiny-moe", "--json").stdout)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("what", ["selective", "full"])
def test_layers_that_repeat_can_be_made_again(workplace: Path, precision: str, what: str) -> None:
    common = ["train.steps=3", "model.unique_layers=1", f"train.precision={precision}"]
    kept = train_here(workplace, "moe", *common, "name=kept")
    again = train_here(workplace, "moe", *common, "name=again", f"parallel.activation_checkpointing={what}")
    (steps, meant), (_, found) = (zip(*losses(run), strict=True) for run in (kept, again))
    assert steps == (1, 2, 3)
    assert found == pytest.approx(meant, rel=1e-3 if precision == "bf16" else 1e-6)


def test_recomputing_changes_no_loss(workplace: Path) -> None:
    kept = train_here(workplace, "moe", "train.steps=4", "name=kept")
    made_again = train_here(
        workplace, "moe", "train.steps=4", "name=made-again", "parallel.activation_checkpointing=selective"
    )
    assert losses(kept) == losses(made_again)


def test_a_profile_is_a_table_and_a_trace(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml", "--profile")
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stderr
    trace = json.loads((workplace / "runs/tiny-moe/trace.json").read_text())
    assert any("aten::mm" in event["name"] for event in trace["traceEvents"] if "name" in event)


def test_a_run_keeps_the_precision_it_began_with(workplace: Path) -> None:
    run = train_here(workplace, "moe", "train.precision=bf16", "train.steps=8", "name=low")
    before = losses(run)
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    train_here(workplace, "moe", "train.precision=auto", "train.steps=8", "name=low")
    assert losses(run) == before
    assert load_config(run / "config.yaml").train.precision == "bf16"
