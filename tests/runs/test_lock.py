"""The lock of a run: who gets it, who is refused, and who takes it over."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from moelm.errors import MoelmError
from moelm.runs import lock
from moelm.runs.directory import RunDirectory
from moelm.runs.lock import RunLock, refuse_if_locked

HOLDER = """
import sys, time
from pathlib import Path
from moelm.runs.directory import RunDirectory
from moelm.runs.lock import RunLock
with RunLock(RunDirectory(Path(sys.argv[1]))):
    print("locked", flush=True)
    time.sleep(60)
"""
"""A process that holds a lock."""


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT_S": 0.05, "WATCH_S": 0.4, "RESTART_S": 0.4}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs/x")


def write_lock(run: RunDirectory, **changes: Any) -> None:
    """Write a lock that a process of another machine has left."""
    run.path.mkdir(parents=True, exist_ok=True)
    owner = RunLock(run).owner._replace(pid=7, host="elsewhere", boot="another", **changes)
    run.lock.write_text(json.dumps(owner._asdict()))


def test_a_second_training_is_refused_and_the_lock_leaves_nothing_behind(run: RunDirectory) -> None:
    with RunLock(run):
        files = {path.name: path.read_bytes() for path in run.path.iterdir()}
        expected = rf"{run.path} is being trained by process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(MoelmError, match=expected), RunLock(run):
            pass
        with pytest.raises(MoelmError, match=r"; stop it, wait for its end, or choose another name=\.\.\. \."):
            refuse_if_locked(run)
        assert {path.name: path.read_bytes() for path in run.path.iterdir()} == files
    assert not run.path.parent.exists()
    refuse_if_locked(run)


def test_the_files_of_a_run_remain(run: RunDirectory) -> None:
    with RunLock(run):
        run.config.touch()
    assert list(run.path.iterdir()) == [run.config]


def test_one_of_many_that_start_at_the_same_instant_gets_the_lock(run: RunDirectory) -> None:
    barrier, locked, refused = threading.Barrier(8), [], []

    def start() -> None:
        own = RunLock(run)
        barrier.wait()
        try:
            stack.enter_context(own)
            locked.append(own)
        except MoelmError as error:
            refused.append(str(error))

    with ExitStack() as stack:
        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(locked), len(refused)) == (1, 7)
        assert all("is being trained by process" in message for message in refused)


def test_the_lock_of_a_killed_process_is_taken_over(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(MoelmError, match=f"process {holder.pid} on "), RunLock(run):
            pass
        holder.kill()
        holder.wait()
        assert run.lock.exists()
        with RunLock(run):
            assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    message = capsys.readouterr().err
    assert re.search(rf"Taking over {run.path} from process {holder.pid} on .*, which has died\.", message)


@pytest.mark.parametrize("has_flock", [True, False])
def test_another_machine_is_watched_for_an_update_of_the_lock(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_flock: bool
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", refuse)
    write_lock(run)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(run.lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(MoelmError, match="process 7 on elsewhere"), RunLock(run):
            pass
    finally:
        stop.set()
        thread.join()
    with RunLock(run):
        pass
    assert "Taking over" in capsys.readouterr().err


def test_what_needs_no_watching(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock of the same launch, an old one, and one that was cut off by a kill or a full disk."""
    monkeypatch.setattr(lock, "WATCH_S", 1000)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    write_lock(run, launch="job")
    with RunLock(run):
        pass
    assert capsys.readouterr().err == ""
    write_lock(run)
    os.utime(run.lock, (time.time() - 3600,) * 2)
    with RunLock(run):
        pass
    write_lock(run)
    run.lock.write_text(run.lock.read_text()[:20])
    with RunLock(run):
        pass


def test_torchruns_default_name_is_not_a_launch(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with RunLock(run) as own:
        assert own.owner.launch == ""


def test_the_owner_that_was_taken_over_stops_and_leaves_the_lock_alone(run: RunDirectory) -> None:
    with RunLock(run) as own:
        own.check()
        write_lock(run)
        deadline = time.monotonic() + 10
        while own._lost_to is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(MoelmError, match="has been taken over by process 7 on elsewhere"):
            own.check()
    assert run.lock.exists()


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(MoelmError, match="cannot be written: "), RunLock(RunDirectory(tmp_path / "runs/x")):
        pass


@pytest.mark.parametrize("target", ["file", "nothing"])
def test_a_link_is_not_followed(run: RunDirectory, tmp_path: Path, target: str) -> None:
    run.path.mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    run.lock.symlink_to(tmp_path / target)
    with pytest.raises(MoelmError, match="cannot be written: "), RunLock(run):
        pass
    refuse_if_locked(run)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(MoelmError, match="cannot be written: No space left on device"), RunLock(run):
        pass
    assert not run.path.parent.exists()
