"""The files that the path of a source names: a file, or a pattern with `*`, `?`, `[...]` and `**`."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from moelm.errors import MoelmError


class MissingSource(MoelmError):
    """A source that does not exist, or no longer."""


def matching_files(pattern: str) -> list[Path]:
    """The files that a pattern names, sorted; a file with several names is listed once.

    A component of the path that exists as it is written is taken literally, brackets and stars included.

    Raises:
        MissingSource: there are none.
        MoelmError: a directory, or something that is neither a file nor a directory.
    """
    if Path(pattern).is_dir():
        raise MoelmError(f"{pattern} is a directory; a file or a pattern such as {pattern.rstrip('/')}/*.txt is expected.")
    root, relative = (os.sep, pattern.lstrip(os.sep)) if pattern.startswith(os.sep) else ("", pattern)
    try:
        found = sorted(set(_matches(root, relative.split(os.sep))))
    except OSError as error:
        raise MoelmError(f"{error.filename} cannot be read: {error.strerror}.") from None
    files: dict[tuple[int, int], Path] = {}
    for path in map(Path, found):
        try:
            state = path.stat()
        except FileNotFoundError:
            raise MissingSource(f"{path} is a link to a file that does not exist.") from None
        except OSError as error:
            raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
        if stat.S_ISDIR(state.st_mode):
            continue
        if not stat.S_ISREG(state.st_mode):
            raise MoelmError(f"{path} is not a regular file; pipes and devices cannot be read.")
        files.setdefault((state.st_dev, state.st_ino), path)
    if not files:
        is_pattern = glob.has_magic(pattern)
        problem = "matches only directories" if found else "matches no file" if is_pattern else "does not exist"
        hint = "; [...] in a pattern stands for one of these characters" if "[" in pattern else ""
        raise MissingSource(f"{pattern} {problem}{hint}.")
    return list(files.values())


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, sorted, without hidden ones."""
    return sorted(path for name in _folders(str(folder)) for path in Path(name).iterdir() if _is_visible_file(path))


def _is_visible_file(path: Path) -> bool:
    return not path.name.startswith(".") and path.is_file()


def _matches(prefix: str, components: list[str]) -> Iterator[str]:
    """The existing paths below `prefix` that the components match."""
    if not components:
        yield prefix
        return
    head, *rest = components
    literal = os.path.join(prefix, head)
    if os.path.lexists(literal) and (not rest or os.path.isdir(literal)):
        yield from _matches(literal, rest)
    elif head == "**":
        for folder in _folders(prefix):
            yield from _matches(folder, rest or ["*"])
    elif glob.has_magic(head) and os.path.isdir(prefix or os.curdir):
        for name in os.listdir(prefix or os.curdir):
            if fnmatch.fnmatchcase(name, head) and (head.startswith(".") or not name.startswith(".")):
                path = os.path.join(prefix, name)
                if not rest or os.path.isdir(path):
                    yield from _matches(path, rest)


def _folders(top: str) -> Iterator[str]:
    """A folder and those below it, without hidden ones; a link is followed unless it leads to a folder already visited."""

    def fail(error: OSError) -> None:
        raise error

    visited: set[tuple[int, int]] = set()
    for folder, names, _ in os.walk(top or os.curdir, followlinks=True, onerror=fail):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in visited:
            names.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder if top else folder.removeprefix(os.curdir).lstrip(os.sep)
