"""How a command ends: its standard streams, and one sentence and an exit code for every error."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moelm.console import printable, printable_line
from moelm.errors import MoelmError

PACKAGE = Path(__file__).parents[1]
SHOWN_CHARACTERS = 300
"""Of the message of an unexpected error."""


class OutputError(MoelmError):
    """Standard output cannot be written."""


class OutputClosed(OutputError):
    """The process that reads standard output has closed it."""

    exit_code = 128 + signal.SIGPIPE
    reported = True


class _Stdout(io.FileIO):
    """Standard output, whose first failure is an `OutputError`; what follows is dropped."""

    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data) or 0
        except BrokenPipeError as error:
            self.failed = True
            raise OutputClosed("Standard output is closed.") from error
        except OSError as error:
            self.failed = True
            raise OutputError(f"Standard output cannot be written: {error.strerror}.") from error


class _Stderr(io.FileIO):
    """Standard error; what cannot be written is dropped, so that a run continues when its terminal is closed."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def open_streams() -> None:
    """Replace the process's standard streams by those above; a closed one is connected to nothing.

    Otherwise the next file that is opened would take the place of a closed stream, and get its output. A stream that
    somebody else has replaced, as a test does, stays.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_stream(_Stdout(1, "w", closefd=False), sys.stdout, os.isatty(1))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text_stream(_Stderr(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _text_stream(raw: io.FileIO, old: Any, line_buffering: bool) -> io.TextIOWrapper:
    """A text stream like the old one, except that characters its encoding lacks are written as escapes."""
    encoding, errors = ("utf-8", "strict") if old is None else (old.encoding, old.errors)
    errors = "backslashreplace" if errors == "strict" else errors
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=line_buffering)


def require_current_directory() -> None:
    """Refuse to run in a directory that has been removed, where torch cannot be imported.

    Raises:
        MoelmError: it has.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise MoelmError(f"The current directory cannot be used: {error.strerror}.") from None


@contextmanager
def error_boundary() -> Iterator[None]:
    """End the process with one sentence on stderr and an exit code if the block fails.

    `MOELM_DEBUG=1` shows the traceback too.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except MoelmError as error:
        _end(error, None if error.reported else f"moelm: {error}", error.exit_code)
    except KeyboardInterrupt as error:
        _end(error, "moelm: interrupted.", 130)
    except Exception as error:
        _end(error, f"moelm: {_rank()}{describe_unexpected(error)}; set MOELM_DEBUG=1 to see the traceback.", 2)


def _end(error: BaseException, sentence: str | None, exit_code: int) -> None:
    if os.environ.get("MOELM_DEBUG", "0") not in ("", "0"):
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    if sentence is not None:
        sys.stderr.write(f"{printable_line(sentence)}\n")
    sys.stderr.flush()
    sys.exit(exit_code)


def describe_unexpected(error: Exception) -> str:
    """What failed, with type, message and place, as a clause."""
    message = " ".join(str(error).split()) or "no message"
    message = message if len(message) <= SHOWN_CHARACTERS else f"{message[:SHOWN_CHARACTERS]}…"
    return f"{_what_failed(error, message)} ({type(error).__name__}: {message.rstrip('.')}; at {_place(error)})"


def _what_failed(error: Exception, message: str) -> str:
    """The kind of failure in plain words; torch's own classes are recognized by their messages, without importing it."""
    if isinstance(error, MemoryError) or any(text in message for text in ("out of memory", "can't allocate memory")):
        return "there is not enough memory"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        named = isinstance(error.filename, str | bytes)
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror
    return "an unexpected error ended the command"


def _place(error: Exception) -> str:
    """File and line of the innermost frame of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE) and frame.filename != __file__]
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    name = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path
    return f"{name}:{frame.lineno}"


def _rank() -> str:
    """The process, if it is one of several."""
    return f"rank {os.environ.get('RANK', '?')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
