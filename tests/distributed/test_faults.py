"""Failures on several processes: kills, signals, hangs, ranks that disagree, full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelm.runs.checkpoint import list_checkpoints, verify
from moelm.runs.directory import RunDirectory
from moelm.runs.lock import RunLock
from tests.conftest import Moelm, metrics_lines, train_here
from tests.distributed.launching import NO_NEAR_TIES, ROOT, count_steps, wait_for_steps

ENDLESS = [*NO_NEAR_TIES, "train.steps=100000", "train.eval_every=100000", "train.checkpoint_every=10"]


def start_training(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `moelm train --nproc 2` in the background."""
    command = [sys.executable, "-m", "moelm", "train", "moe.yaml", *overrides, "--nproc", "2"]
    (folder / "temporary").mkdir()
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "temporary")},
    )


def workers(launcher: int) -> list[int]:
    """Process ids of a launcher's children, by rank."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def test_of_two_processes_one_prints(moelm: Moelm, workplace: Path) -> None:
    done = moelm("train", "moe.yaml", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    assert done.stderr.count("step      8/8") == 1
    assert "Warning" not in done.stderr
    environment = json.loads((workplace / "runs/tiny-moe/environment.json").read_text())
    assert environment["processes"] == 2
    assert environment["parallel_dims"] == {"dp_replicate": 2, "dp_shard": 1, "ep": 1}
    single = train_here(workplace, "moe", "name=single")
    tokens = [line["tokens"] for line in metrics_lines(workplace / "runs/tiny-moe")]
    assert tokens == [line["tokens"] for line in metrics_lines(single)]


def test_impossible_launches_are_errors_of_one_sentence(moelm: Moelm, workplace: Path) -> None:
    nested = moelm("train", "moe.yaml", "--nproc", "2", env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"})
    assert (nested.returncode, nested.stderr.count("\n")) == (2, 1)
    assert "this process was started by a launcher" in nested.stderr
    unreachable = moelm("train", "moe.yaml", env={**os.environ, "WORLD_SIZE": "2"})
    assert "cannot reach each other" in unreachable.stderr
    assert "Traceback" not in unreachable.stderr
    too_few = moelm("train", "moe.yaml", "parallel.ep=4", "parallel.dp_shard=auto", "--nproc", "2")
    assert (too_few.returncode, too_few.stderr.count("\n")) == (2, 1)
    train_here(workplace, "moe", "train.steps=2")
    existing = moelm("train", "moe.yaml", "train.steps=2", "--resume", "never", "--nproc", "2", "--max-restarts", "2")
    assert existing.returncode == 2
    assert "exists already" in existing.stderr


@pytest.mark.exhaustive
@pytest.mark.slow(seconds=40)
def test_kills_and_restarts_do_not_change_the_trajectory(workplace: Path) -> None:
    settings = [*NO_NEAR_TIES, "train.steps=200", "train.eval_every=100", "train.checkpoint_every=10"]
    command = [sys.executable, str(ROOT / "scripts/kill_study.py"), "moe.yaml", *settings, "--kills", "2", "--within", "2"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "2 kills" in done.stdout
    assert "equal" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in (signal.SIGUSR1, signal.SIGHUP))],
)
def test_a_signal_of_a_scheduler_saves_a_checkpoint(workplace: Path, signum: signal.Signals) -> None:
    process = start_training(workplace, *ENDLESS)
    wait_for_steps(workplace, 3)
    for worker in workers(process.pid):  # some schedulers signal all processes, and the launcher forwards its signal too
        os.kill(worker, signum)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output
    assert output.count(f"Stopped by {signum.name} and saved at step") == 1
    assert "Traceback" not in output
    left = [path.name for path in (workplace / "temporary").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor")] == []  # that is torch's cache
    newest = list_checkpoints(workplace / "runs/tiny-moe/checkpoints")[-1]
    verify(newest)
    assert int(newest.name.rpartition("-")[2]) == count_steps(workplace)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_orphans_of_a_killed_launcher_keep_the_run(moelm: Moelm, workplace: Path) -> None:
    process = start_training(workplace, *ENDLESS)
    wait_for_steps(workplace, 3)
    orphans = workers(process.pid)
    process.kill()
    process.wait()
    wait_for_steps(workplace, count_steps(workplace))
    refused = moelm("train", "moe.yaml", *ENDLESS, "--nproc", "2", "--max-restarts", "2")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"moelm: runs/tiny-moe is being trained by process {orphans[0]} on ")
    assert refused.stderr.count("\n") == 1
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    with RunLock(RunDirectory(workplace / "runs/tiny-moe")):
        pass


@pytest.mark.slow
def test_a_hanging_rank_is_named(workplace: Path) -> None:
    process = start_training(workplace, *ENDLESS, "parallel.timeout_s=3")
    wait_for_steps(workplace, 3)
    hung = workers(process.pid)[1]
    os.kill(hung, signal.SIGSTOP)
    assert process.stdout is not None
    started = time.monotonic()
    output = ""
    while "does not respond" not in output:
        output += process.stdout.readline()
        assert time.monotonic() - started < 60, output
    os.kill(hung, signal.SIGCONT)  # the launcher waits for all processes to exit
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 134, output
    assert output.count("does not respond") == 1
    assert "Rank 1 of 2 does not respond after step" in output
    assert "Traceback" not in output


def run_on_two_ranks(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script, which can read RANK, in two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [sys.executable, *launch, "bash", "-c", script]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ranks_with_different_settings_or_data_are_refused(workplace: Path) -> None:
    done = run_on_two_ranks(workplace, "exec $PYTHON -m moelm train moe.yaml seed=$RANK")
    assert done.returncode != 0
    assert done.stderr.count("Rank 1 of 2 has another seed than rank 0 (1 instead of 0)") == 1, done.stderr
    assert not (workplace / "runs").exists()

    for rank in (0, 1):
        (workplace / f"{rank}").mkdir()
        (workplace / f"{rank}/moe.yaml").write_text((workplace / "moe.yaml").read_text())
        text = (workplace / "text.txt").read_text().splitlines(keepends=True)
        (workplace / f"{rank}/text.txt").write_text("".join(text[rank:]))
    done = run_on_two_ranks(workplace, "cd $RANK && exec $PYTHON -m moelm train moe.yaml")
    assert "Rank 1 of 2 has another data than rank 0" in done.stderr
    assert not (workplace / "0/runs").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_full_disk_of_one_rank_loses_checkpoints_and_no_step(workplace: Path) -> None:
    overrides = "train.steps=8 train.checkpoint_every=2 parallel.dp_shard=2 train.keep_checkpoints=9"
    script = f"[ $RANK = 1 ] && ulimit -f 30; exec $PYTHON -m moelm train moe.yaml {overrides}"
    done = run_on_two_ranks(workplace, script)
    assert "Warning: The checkpoint of step 2 could not be saved" in done.stderr, done.stderr
    assert "Warning: The checkpoint of step 6 could not be saved" in done.stderr
    assert "moelm: The checkpoint of step 8 could not be saved" in done.stderr
    assert len(metrics_lines(workplace / "runs/tiny-moe")) == 8
    assert not list((workplace / "runs/tiny-moe/checkpoints").iterdir())
