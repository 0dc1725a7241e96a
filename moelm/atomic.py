"""Files and directories that appear complete or not at all: written under a temporary name, then renamed."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelm.errors import MoelmError

_MARK = ".writing-"
_OLD = "-old"


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `target` at the end of the block, removed after an error.

    Raises:
        OSError: it cannot be renamed.
    """
    temporary = temporary_path(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path, temporary: Path | None = None, replace: bool = False) -> Iterator[Path]:
    """A new temporary directory to fill; renamed to `target` at the end of the block, removed after an error.

    Args:
        target: the final path. Unless `replace` is set, it must not exist or must be an empty directory.
        temporary: the temporary path, where several processes must agree on it; default: `temporary_path(target)`.
        replace: whether an existing `target` is replaced; it is kept if the block fails.

    Raises:
        OSError: it cannot be written, or `target` is taken.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    work = temporary or temporary_path(target)
    old = work.with_name(f"{work.name}{_OLD}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        yield work
        if replace and target.exists():
            target.rename(old)
        work.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def temporary_path(target: Path, writer: str | None = None) -> Path:
    """The hidden path beside `target` where `writer` (default: this process) writes it."""
    return target.with_name(f".{target.name}{_MARK}{writer or f'{platform.node()}-{os.getpid()}'}")


def remove_temporary(directory: Path, prefix: str) -> None:
    """Remove temporary directories of targets whose names start with `prefix`, whoever wrote them."""
    for path in directory.glob(f".{prefix}*{_MARK}*"):
        shutil.rmtree(path, ignore_errors=True)


def require_empty_directory(path: Path) -> Path:
    """The absolute path of a directory that can be created, or that exists and is empty.

    Raises:
        MoelmError: something exists there.
    """
    full = path.resolve()
    if full.exists() and (not full.is_dir() or any(full.iterdir()) or full == Path.cwd()):
        raise MoelmError(
            f"{path} exists already; a new directory, or an empty one other than the current one, is expected."
        )
    return full


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed writers of this machine have left; a replaced directory whose successor is missing is restored."""
    for path in directory.glob(f".*{_MARK}*"):
        name, _, writer = path.name.removeprefix(".").rpartition(_MARK)
        if path.is_dir() and _writer_is_dead(writer):
            target = path.with_name(name)
            if writer.endswith(_OLD) and not target.exists():
                path.rename(target)
            shutil.rmtree(path, ignore_errors=True)


def _writer_is_dead(writer: str) -> bool:
    """Whether the writer was a process of this machine that no longer exists."""
    machine, _, process = writer.removesuffix(_OLD).rpartition("-")
    if machine != platform.node() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
