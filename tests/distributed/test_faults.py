"""What goes wrong on several processes: kills, signals, hangs, disagreement, full disks. All of it for real."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moelm.runs.checkpoint import list_checkpoints, verify
from tests.conftest import Moelm, train_here
from tests.distributed.launching import ROOT, STEADY, metrics

LONG = [*STEADY, "train.steps=100000", "train.eval_every=100000", "train.checkpoint_every=10"]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`moelm train --nproc 2` in the background."""
    command = [sys.executable, "-m", "moelm", "train", "moe.yaml", *words, "--nproc", "2"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(found: Callable[[], object], seconds: float = 90) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def steps_done(folder: Path) -> int:
    path = folder / "runs/tiny-moe/metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def workers(launcher: int) -> list[int]:
    """Children of the launcher, the first rank first."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def test_two_processes_train_and_one_speaks(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    assert done.stderr.count("step      8/8") == 1
    environment = json.loads((workplace / "runs/tiny-moe/environment.json").read_text())
    assert environment["processes"] == 2
    assert environment["parallel_dims"] == {"dp_replicate": 2, "dp_shard": 1, "ep": 1}
    alone = train_here(workplace, "moe", "name=alone")
    together = [line["tokens"] for line in metrics(workplace / "runs/tiny-moe")]
    assert together == [line["tokens"] for line in metrics(alone)]


def test_launches_that_cannot_be_are_sentences(moelm: Moelm, workplace: Path) -> None:
    inside = moelm("train", "moe.yaml", "--nproc", "2", env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
    assert (inside.returncode, inside.stderr.count("\n")) == (2, 1)
    assert "this process was started by a launcher" in inside.stderr
    lost = moelm("train", "moe.yaml", env={**os.environ, "WORLD_SIZE": "2"})
    assert "cannot reach each other" in lost.stderr
    assert "Traceback" not in lost.stderr
    few = moelm("train", "moe.yaml", "parallel.ep=4", "parallel.dp_shard=auto", "--nproc", "2")
    assert (few.returncode, few.stderr.count("\n")) == (2, 1)
    train_here(workplace, "moe", "train.steps=2")
    again = moelm("train", "moe.yaml", "train.steps=2", "--resume", "never", "--nproc", "2", "--max-restarts", "2")
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
def test_kills_and_restarts_change_no_figure(workplace: Path) -> None:
    settings = [*STEADY, "train.steps=400", "train.eval_every=100", "train.checkpoint_every=10"]
    command = [sys.executable, str(ROOT / "scripts/kill_study.py"), "moe.yaml", *settings, "--kills", "2", "--within", "4"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "2 kills" in done.stdout
    assert "equal" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_scheduler_that_wants_the_machine_back_gets_it_saved(workplace: Path, signum: signal.Signals) -> None:
    process = start(workplace, *LONG)
    until(lambda: steps_done(workplace) > 3)
    for worker in workers(process.pid):  # some schedulers signal all processes, and the launcher hands it on once more
        os.kill(worker, signum)
    process.send_signal(signum)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, told
    assert told.count(f"Stopped by {signum.name} and saved at step") == 1
    assert "Traceback" not in told
    newest = list_checkpoints(workplace / "runs/tiny-moe/checkpoints")[-1]
    verify(newest)
    assert int(newest.name.rpartition("-")[2]) == steps_done(workplace)


@pytest.mark.slow
def test_who_hangs_is_named_and_nobody_waits_for_ever(workplace: Path) -> None:
    process = start(workplace, *LONG, "parallel.timeout_s=3")
    until(lambda: steps_done(workplace) > 3)
    hung = workers(process.pid)[1]
    os.kill(hung, signal.SIGSTOP)
    assert process.stdout is not None
    began = time.monotonic()
    told = ""
    while "does not respond" not in told:
        told += process.stdout.readline()
        assert time.monotonic() - began < 60, told
    os.kill(hung, signal.SIGCONT)  # the launcher would wait for it to end in peace
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 134, told + rest
    assert (told + rest).count("does not respond") == 1
    assert "Rank 1 of 2 does not respond after step" in told
    assert "Traceback" not in told + rest


def by_rank(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Two processes, each running a shell script that knows its RANK."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [sys.executable, *launch, "bash", "-c", script]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
def test_processes_that_would_do_different_things_do_nothing(workplace: Path) -> None:
    done = by_rank(workplace, "exec $PYTHON -m moelm train moe.yaml seed=$RANK")
    assert done.returncode != 0
    told = "Rank 1 of 2 has another seed than rank 0 (1 instead of 0)"
    assert done.stderr.count(told) == 1, done.stderr
    assert not (workplace / "runs").exists()

    for rank in (0, 1):
        (workplace / f"{rank}").mkdir()
        (workplace / f"{rank}/moe.yaml").write_text((workplace / "moe.yaml").read_text())
        text = (workplace / "text.txt").read_text().splitlines(keepends=True)
        (workplace / f"{rank}/text.txt").write_text("".join(text[rank:]))
    done = by_rank(workplace, "cd $RANK && exec $PYTHON -m moelm train moe.yaml")
    assert "Rank 1 of 2 has another data than rank 0" in done.stderr
    assert not (workplace / "0/runs").exists()


@pytest.mark.slow
def test_a_full_disk_at_one_of_them_costs_a_checkpoint_and_no_step(workplace: Path) -> None:
    settings = "train.steps=8 train.checkpoint_every=2 parallel.dp_shard=2"
    limited = f"[ $RANK = 1 ] && ulimit -f 30; exec $PYTHON -m moelm train moe.yaml {settings} train.keep_checkpoints=9"
    done = by_rank(workplace, limited)
    assert "Warning: The checkpoint of step 2 could not be saved" in done.stderr, done.stderr
    assert "Warning: The checkpoint of step 6 could not be saved" in done.stderr
    assert "moelm: The checkpoint of step 8 could not be saved" in done.stderr
    assert len(metrics(workplace / "runs/tiny-moe")) == 8
    assert not list((workplace / "runs/tiny-moe/checkpoints").iterdir())
