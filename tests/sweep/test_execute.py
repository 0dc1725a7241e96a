"""A sweep from its file to its comparison, with the real command line."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.config import RunConfig, load_config
from moelm.distributed.launcher import count_cpus
from moelm.errors import MoelmError
from moelm.runs.directory import RunDirectory
from moelm.runs.lock import RunLock
from moelm.sweep.execute import train_all
from moelm.sweep.variant import SweepVariant
from tests.conftest import Moelm
from tests.processes import start_moelm

ROOT = Path(__file__).parents[2]


def write_sweep(folder: Path, steps: int, **settings: Any) -> None:
    sparse = {"kind": "moe", "hidden_dim": 16, "num_experts": 4, "top_k": 2}
    tree = {
        "name": "study",
        "config": "dense.yaml",
        "seeds": [0, 1],
        "match": "flops_per_token",
        "budget": {"tokens": 256 * steps},
        "variants": {"dense": {"model.ffn.hidden_dim": 64}, "moe": {"model.ffn": sparse}},
        **settings,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def test_a_dry_run_trains_nothing(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=4)
    done = moelm("sweep", "sweep.yaml", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned.keys() == {"schema", "name", "match", "variants"}
    assert (planned["schema"], planned["name"], planned["match"]) == (2, "study", "flops_per_token")
    dense, moe = planned["variants"]
    assert (dense["label"], moe["label"]) == ("dense", "moe")
    assert moe["runs"] == ["study-moe-0", "study-moe-1"]
    assert moe["steps"] == 4
    assert moe["seconds"] > 0
    # On two processes nothing is timed, which takes seconds.
    table = moelm("sweep", "sweep.yaml", "--dry-run", "--nproc", "2").stdout.splitlines()
    assert table[0].split()[:4] == ["variant", "hidden_dim", "active", "total"]
    assert [line.split()[0] for line in table[1:3]] == ["dense", "moe"]
    assert table[-1].startswith("4 runs, ")
    assert not (workplace / "runs").exists()


@pytest.mark.slow(seconds=25)
@pytest.mark.exhaustive
def test_a_sweep_is_interrupted_continued_and_compared(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=60)
    process = start_moelm(["sweep", "sweep.yaml"], workplace)
    second = workplace / "runs/study-moe-0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (second.exists() and second.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.is_running, process.finish()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = process.finish(60)
    log = done.stderr
    assert done.returncode == 130, log
    assert "Stopped by SIGINT and saved at step" in log
    assert log.splitlines()[-1] == "moelm: The sweep stopped; run the same command again to continue with study-moe-0."

    done = moelm("sweep", "sweep.yaml", "--jobs", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert "study-dense-0 is already trained." in done.stderr
    for number in range(1, 5):
        assert f"[{number}/4] study-" in done.stderr
    assert "Resuming runs/study-moe-0 from step" in done.stderr
    report = json.loads(done.stdout)
    assert [(each["name"], len(each["runs"])) for each in report["variants"]] == [("dense", 2), ("moe", 2)]
    assert report["pairs"][0]["paired"]["seeds"] == [2, 2]
    assert (workplace / "reports/study/report.html").exists()
    lines = [json.loads(text) for text in second.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    alone = moelm("train", "dense.yaml", "name=alone", "seed=1", "model.ffn.hidden_dim=64", "train.steps=60")
    assert alone.returncode == 0, alone.stderr
    losses = [
        [json.loads(line)["train/loss"] for line in (workplace / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "study-dense-1")
    ]
    assert losses[0] == losses[1]

    again = moelm("sweep", "sweep.yaml", "train.eval_every=7", "--out", "reports/again")
    assert again.returncode == 0, again.stderr  # it does not change the trajectory
    assert "[1/4] study-dense-0 is already trained." in again.stderr
    for override in ("optim.lr=0.02", "model.window=8"):
        again = moelm("sweep", "sweep.yaml", override)
        assert again.returncode == 2
        assert f"study-dense-0 exists already with another {override.partition('=')[0]}" in again.stderr


@pytest.mark.slow(seconds=10)
def test_runs_at_the_same_time_are_stopped_once_and_save(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=60)
    process = start_moelm(["sweep", "sweep.yaml", "--jobs", "3"], workplace)
    started = [workplace / f"runs/study-{name}/metrics.jsonl" for name in ("dense-0", "moe-0", "dense-1")]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text().count("\n") > 3 for path in started):
        assert time.monotonic() < deadline
        assert process.is_running, process.finish()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    done = process.finish(60)
    assert done.returncode == 143, done.stderr
    # Each gets the signal once: a second one would end it before it has saved.
    finished = sum(path.read_text().count("\n") == 60 for path in started)
    assert done.stderr.count("Stopped by SIGTERM and saved at step") == 3 - finished
    assert "moelm: The sweep stopped; run the same command again to continue with study-" in done.stderr.splitlines()[-1]
    assert not (workplace / "runs/study-moe-1").exists()


def test_the_other_jobs_of_a_failed_run_are_stopped(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=2000)
    with RunLock(RunDirectory(workplace / "runs/study-moe-0")):
        done = moelm("sweep", "sweep.yaml", "--jobs", "2")
    assert done.returncode == 2
    assert "moelm: runs/study-moe-0 is being trained by process " in done.stderr
    assert done.stderr.splitlines()[-1].endswith("run the same command again to continue with study-moe-0.")
    assert not (workplace / "runs/study-dense-1").exists()
    metrics = workplace / "runs/study-dense-0/metrics.jsonl"
    assert not metrics.exists() or metrics.read_text().count("\n") < 2000


def test_runs_at_the_same_time_exclude_a_budget_of_seconds(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=2, budget={"seconds": 5})
    done = moelm("sweep", "sweep.yaml", "--jobs", "2")
    assert done.returncode == 2
    assert "with --nproc or --jobs, one of tokens or flops is expected" in done.stderr


def test_a_signal_between_runs_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the sweep looks whether a run is finished, no process gets the signal."""

    def is_finished(run: RunDirectory, expected: RunConfig) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr("moelm.sweep.execute._is_finished", is_finished)
    config = load_config(ROOT / "tests/configs/dense.yaml")
    runs = {0: RunDirectory(Path("runs/a")), 1: RunDirectory(Path("runs/b"))}
    variant = SweepVariant("dense", "dense", None, [], config, Path("dense.yaml"), runs)
    with pytest.raises(MoelmError, match="The sweep stopped; run the same command again to continue") as stopped:
        train_all([variant], processes=1, jobs=1, budget=None)
    assert stopped.value.exit_code == 130


def test_a_run_with_an_additional_setting_is_another_run(moelm: Moelm, workplace: Path) -> None:
    """A finished run with a window is not taken for one without."""
    write_sweep(workplace, steps=2)
    settings = ("name=study-dense-0", "seed=0", "model.ffn.hidden_dim=64", "train.steps=2", "model.window=8")
    assert moelm("train", "dense.yaml", *settings).returncode == 0
    done = moelm("sweep", "sweep.yaml")
    assert done.returncode == 2
    assert "study-dense-0 exists already with another model.window" in done.stderr


def test_a_sweep_stops_at_a_run_that_is_being_trained(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=2)
    with RunLock(RunDirectory(workplace / "runs/study-dense-0")):
        done = moelm("sweep", "sweep.yaml")
        assert list((workplace / "runs/study-dense-0").iterdir()) == [workplace / "runs/study-dense-0/lock"]
    assert done.returncode == 2
    refusal, last = done.stderr.splitlines()[-2:]
    assert refusal.startswith("moelm: runs/study-dense-0 is being trained by process ")
    assert last == "moelm: The sweep stopped; run the same command again to continue with study-dense-0."


def test_an_unusable_report_directory_is_refused_before_training(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=2)
    (workplace / "mine").mkdir()
    (workplace / "mine/thesis.tex").touch()
    done = moelm("sweep", "sweep.yaml", "--out", "mine")
    assert done.returncode == 2
    assert "mine is not empty and holds no earlier report" in done.stderr
    assert not (workplace / "runs").exists()


@pytest.mark.exhaustive
@pytest.mark.slow(seconds=30)
def test_the_branches_of_a_sweep_are_trained_and_compared_as_lengths(moelm: Moelm, workplace: Path) -> None:
    write_sweep(workplace, steps=20, seeds=[3], branches=[0.5])
    overrides = ("optim.schedule=wsd", "optim.warmup_steps=2", "train.checkpoint_every=4", "train.keep_checkpoints=5")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = moelm("sweep", "sweep.yaml", *overrides, "--jobs", "2", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((workplace / "runs/study-moe-3-10/environment.json").read_text())
    assert recorded["threads"] == max(1, count_cpus() // 2)
    assert recorded["branched_from"] == {"run": "runs/study-moe-3", "step": 8}
    report = json.loads(done.stdout)
    assert [[length["steps"] for length in variant["lengths"]] for variant in report["variants"]] == [[10, 20]] * 2
    again = moelm("sweep", "sweep.yaml", *overrides)
    assert again.stderr.count("is already trained") == 4


@pytest.mark.slow(seconds=20)
def test_a_sweep_with_sizes_ends_in_a_ladder(moelm: Moelm, workplace: Path) -> None:
    sizes = {
        "w8": {"model.dim": 8, "model.ffn.hidden_dim": 32},
        "w16": {"model.dim": 16, "model.ffn.hidden_dim": 64},
    }
    write_sweep(workplace, steps=4, seeds=[0], sizes=sizes, budget=None, tokens_per_param=1)
    done = moelm("sweep", "sweep.yaml", "--jobs", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["kind"], report["reference"]) == ("moelm ladder", "dense")
    names = [run["name"] for each in report["variants"] for size in each["sizes"] for run in size["runs"]]
    assert names == ["study-dense-w8-0", "study-dense-w16-0", "study-moe-w8-0", "study-moe-w16-0"]
    assert "There is no fit: it needs 4 sizes" in report["details"][0]
    assert (workplace / "reports/study/multiplier.png").exists()
    again = moelm("sweep", "sweep.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is already trained") == 4
    assert "Cost at which dense has the same loss" in again.stdout
