"""Folders that appear whole or not at all."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelm.errors import MoelmError

_MARK = ".writing-"


def free_folder(path: Path) -> Path:
    """Where a folder can be put: its full path.

    Raises:
        MoelmError: something is there.
    """
    full = path.resolve()
    if full.exists() and (not full.is_dir() or any(full.iterdir()) or full == Path.cwd()):
        raise MoelmError(f"{path} exists already; a new directory, or an empty one that is not the current, is expected.")
    return full


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when that is done; after an error nothing is left of it.

    Args:
        target: its name, which must not be taken but by an empty folder.

    Raises:
        OSError: it cannot be written, or the name is taken.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".*{_MARK}*"):
        if _abandoned(left.name.rpartition(_MARK)[2]):
            shutil.rmtree(left, ignore_errors=True)
    work = target.with_name(f".{target.name}{_MARK}{platform.node()}-{os.getpid()}")
    try:
        work.mkdir()
        yield work
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _abandoned(maker: str) -> bool:
    """Whether the maker of a folder, a process of this machine, has been killed."""
    machine, _, process = maker.rpartition("-")
    if machine != platform.node() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False  # alive and someone else's, or no process at all
    return False
