"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when that is done; after an error nothing is left of it.

    Args:
        target: its name, which must not be taken but by an empty folder.

    Raises:
        OSError: it cannot be written, or the name is taken.
    """
    mark = f".{target.name}.writing-"
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{mark}*"):
        if not _alive(left.name.removeprefix(mark)):
            shutil.rmtree(left, ignore_errors=True)
    work = target.with_name(f"{mark}{os.getpid()}")
    try:
        work.mkdir()
        yield work
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(process: str) -> bool:
    """Whether the maker of a folder still runs; what is not ours by its name is left alone."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        return True
    return True
