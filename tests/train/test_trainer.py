"""Training by the command line: files, signals, kills, damaged checkpoints, full disks."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from moelm.config import load_config
from tests.conftest import Moelm, losses_by_step, metrics_lines, train_here
from tests.processes import start_moelm

CONTRACT = {"step", "tokens", "flops", "time_s", "train/loss", "train/lr", "train/grad_norm"}
CONTRACT |= {"perf/tokens_per_s", "perf/mfu"}
ROUTING = {"load_max_over_mean", "load_cv", "importance_cv", "entropy", "dead_experts", "aux_loss", "z_loss"}


def test_a_run_writes_the_documented_files_and_metrics(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml")
    assert done.returncode == 0, done.stderr
    assert "The data has been prepared in" in done.stderr
    run = workplace / "runs/tiny-moe"
    files = {path.name for path in run.iterdir()}
    assert files == {"config.yaml", "environment.json", "metrics.jsonl", "documents.npz", "tokenizer.json", "checkpoints"}
    lines = metrics_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line.keys() >= CONTRACT | {f"moe/{name}" for name in ROUTING} | {"moe/layers"} for line in lines)
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8]
    assert lines[-1]["tokens"] == 8 * 256
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-2:] == ["step-00000006", "step-00000008"]

    evaluation = json.loads(moelm("eval", "tiny-moe", "--json").stdout)
    assert evaluation["loss"] == lines[-1]["val/loss"]
    assert evaluation["bpb"] == lines[-1]["val/bpb"]

    changed = moelm("train", "moe.yaml", "optim.lr=0.02")
    assert (changed.returncode, changed.stderr.count("\n")) == (2, 1)
    assert "optim.lr" in changed.stderr
    assert "name=" in changed.stderr
    changed = moelm("train", "moe.yaml", "optim.kind=muon")
    assert (changed.returncode, changed.stderr.count("\n")) == (2, 1)
    assert "another optim.kind" in changed.stderr
    assert moelm("train", "moe.yaml", "--resume", "never").returncode == 2


def kill_and_resume(moelm: Moelm, workplace: Path, steps: int, kills: int) -> None:
    """Kill a run at random steps, resume it, and compare it with an uninterrupted run."""
    command = ["train", "moe.yaml", f"train.steps={steps}", "train.checkpoint_every=7", "train.eval_every=50"]
    assert moelm(*command, "name=uninterrupted").returncode == 0
    metrics = workplace / "runs/killed/metrics.jsonl"
    rng = random.Random(0)
    for _ in range(kills):
        num_lines = metrics.read_text().count("\n") if metrics.exists() else 0
        kill_at = num_lines + rng.randint(1, max(1, steps // (kills + 1)))
        process = start_moelm([*command, "name=killed"], workplace)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_running:
            if metrics.exists() and metrics.read_text().count("\n") >= kill_at:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.finish().returncode == -signal.SIGKILL
    done = moelm(*command, "name=killed")
    assert done.returncode == 0, done.stderr
    killed, uninterrupted = (workplace / f"runs/{name}" for name in ("killed", "uninterrupted"))
    assert losses_by_step(killed) == losses_by_step(uninterrupted)
    assert metrics_lines(killed)[-1]["val/loss"] == metrics_lines(uninterrupted)[-1]["val/loss"]


def test_a_killed_run_resumes_exactly(moelm: Moelm, workplace: Path) -> None:
    kill_and_resume(moelm, workplace, steps=40, kills=1)


@pytest.mark.slow
def test_five_kills_in_200_steps_change_nothing(moelm: Moelm, workplace: Path) -> None:
    kill_and_resume(moelm, workplace, steps=200, kills=5)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_stops_the_run(moelm: Moelm, workplace: Path, signum: signal.Signals) -> None:
    process = start_moelm(["train", "moe.yaml", "train.steps=5000"], workplace)
    metrics = workplace / "runs/tiny-moe/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signum)
    done = process.finish(60)
    assert done.returncode == 128 + signum
    assert "same command" in done.stderr
    assert "Traceback" not in done.stderr
    last = sorted((workplace / "runs/tiny-moe/checkpoints").iterdir())[-1].name
    assert int(last.removeprefix("step-")) == metrics_lines(workplace / "runs/tiny-moe")[-1]["step"]


def test_a_loss_that_is_not_finite_stops_the_run(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml", "optim.lr=1e30", "train.checkpoint_every=1")
    assert done.returncode == 2
    assert "at step" in done.stderr
    assert "good checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(moelm: Moelm, workplace: Path) -> None:
    assert moelm("train", "moe.yaml").returncode == 0
    before = losses_by_step(workplace / "runs/tiny-moe")
    saved = sorted((workplace / "runs/tiny-moe/checkpoints").iterdir())
    newest = saved[-1] / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-10])
    evaluated = moelm("eval", "tiny-moe")
    assert (evaluated.returncode, evaluated.stderr.count("\n")) == (2, 1)
    assert "step-00000008" in evaluated.stderr
    resumed = moelm("train", "moe.yaml")
    assert resumed.returncode == 0
    assert "step-00000008 is damaged" in resumed.stderr
    assert "step 6" in resumed.stderr
    assert losses_by_step(workplace / "runs/tiny-moe") == before
    for path in (workplace / "runs/tiny-moe/checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert moelm("train", "moe.yaml").returncode == 2


def test_a_full_disk_leaves_the_previous_checkpoint_intact(moelm: Moelm, workplace: Path) -> None:
    assert moelm("train", "moe.yaml", "train.steps=4", "name=full").returncode == 0
    source = workplace / "runs/full"
    shutil.copytree(source, workplace / "runs/tiny-moe")
    saved = workplace / "runs/tiny-moe/config.yaml"
    saved.write_text(saved.read_text().replace("steps: 4", "steps: 8"))

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = moelm("train", "moe.yaml", preexec_fn=limit_file_size)
    assert done.returncode == 2, done.stderr
    assert "Warning: The checkpoint of step 6 could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoints = sorted(path.name for path in (workplace / "runs/tiny-moe/checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000004"]
    assert moelm("eval", "tiny-moe").returncode == 0


def test_wandb_offline_writes_the_metrics(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "dense.yaml", "wandb.mode=offline")
    assert done.returncode == 0, done.stderr
    (path,) = (workplace / "runs/tiny-dense").glob("wandb/offline-run-*/*.wandb")
    written = path.read_bytes()
    assert b"train/loss" in written
    for _, loss in losses_by_step(workplace / "runs/tiny-dense"):
        assert str(loss).encode() in written


def test_wandb_online_without_a_login_is_an_error_of_one_sentence(moelm: Moelm, workplace: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = moelm("train", "dense.yaml", "wandb.mode=online", env={**environment, "HOME": str(workplace)})
    assert done.returncode == 2
    assert "wandb.mode is online" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_repeated_layers_can_be_recomputed(workplace: Path, precision: str, recompute: str) -> None:
    common = ["train.steps=3", "model.unique_layers=1", f"train.precision={precision}"]
    stored = train_here(workplace, "moe", *common, "name=stored")
    recomputed = train_here(workplace, "moe", *common, "name=recomputed", f"parallel.activation_checkpointing={recompute}")
    (steps, expected), (_, found) = (zip(*losses_by_step(run), strict=True) for run in (stored, recomputed))
    assert steps == (1, 2, 3)
    # The gradients of repeats are added in another order, in bfloat16 where a weight is cast once for all repeats.
    assert found == pytest.approx(expected, rel=1e-4 if precision == "bf16" else 1e-6)


def test_recomputation_does_not_change_the_losses(workplace: Path) -> None:
    stored, recomputed = (
        train_here(workplace, "moe", "train.steps=4", f"name={what}", f"parallel.activation_checkpointing={what}")
        for what in ("none", "selective")
    )
    assert losses_by_step(stored) == losses_by_step(recomputed)


def test_a_profile_is_a_table_and_a_trace(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml", "optim.kind=muon", "--profile")
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stderr
    shares = dict(re.findall(r"The update by (\w+) takes (.*)% of a step", done.stderr))
    assert shares.keys() == {"adamw", "muon"}
    assert 0 < float(shares["muon"]) < 100
    trace = json.loads((workplace / "runs/tiny-moe/trace.json").read_text())
    names = {event["name"] for event in trace["traceEvents"] if "name" in event}
    assert {"adamw", "muon", "aten::mm"} <= names


def test_a_resumed_run_has_the_precision_it_started_with(workplace: Path) -> None:
    run = train_here(workplace, "moe", "train.precision=bf16", "train.steps=8", "name=low")
    before = losses_by_step(run)
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    train_here(workplace, "moe", "train.precision=auto", "train.steps=8", "name=low")
    assert losses_by_step(run) == before
    assert load_config(run / "config.yaml").train.precision == "bf16"
