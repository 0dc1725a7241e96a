"""Files and directories that appear complete or not at all."""

import platform
import subprocess
from pathlib import Path

import pytest

from moelm.atomic import atomic_directory, atomic_file, require_empty_directory
from moelm.errors import MoelmError


class Failure(Exception):
    """An error while writing."""


def write_and_fail(path: Path) -> None:
    path.write_text("new")
    raise Failure


def test_a_file_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with atomic_file(target) as work:
        work.write_text("new")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "new"


def test_after_an_error_the_old_file_is_unchanged(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(Failure), atomic_file(target) as work:
        write_and_fail(work)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "directory"
    with atomic_directory(target) as work:
        (work / "file").write_text("new")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["directory"]
    assert (target / "file").read_text() == "new"


def test_after_an_error_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(Failure), atomic_directory(tmp_path / "directory") as work:
        write_and_fail(work / "file")
    assert not list(tmp_path.iterdir())


def test_a_directory_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "directory"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(Failure), atomic_directory(target, replace=True) as work:
        write_and_fail(work / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["directory", "old"]
    with atomic_directory(target, replace=True) as work:
        (work / "new").touch()
        assert (target / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["directory", "new"]


def test_an_existing_directory_is_not_replaced_by_default(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "old").touch()
    with pytest.raises(OSError, match="not empty"), atomic_directory(tmp_path / "directory"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["directory", "old"]


def test_temporary_directories_of_dead_processes_are_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    dead = f"{platform.node()}-{process.pid}"
    for name in (f".other.writing-{dead}", f".directory.writing-{dead}", f".lost.writing-{dead}-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    in_use = {f".other.writing-{platform.node()}-1", f".other.writing-elsewhere-{process.pid}"}
    for name in in_use:
        (tmp_path / name).mkdir()
    with atomic_directory(tmp_path / "directory"):
        pass
    # A directory that was renamed to be replaced, and whose successor is missing, is restored.
    assert {path.name for path in tmp_path.iterdir()} == {"directory", "lost", *in_use}
    assert (tmp_path / "lost" / "file").exists()


def test_an_empty_directory_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("new", "empty"):
        assert require_empty_directory(Path(name)) == tmp_path.resolve() / name
    for path in (tmp_path, Path("file")):
        with pytest.raises(MoelmError, match="exists already"):
            require_empty_directory(path)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(MoelmError, match="other than the current one"):
        require_empty_directory(Path("."))
