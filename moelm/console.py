"""Progress and log messages, always on stderr: one live line on a terminal, occasional plain lines elsewhere.

A message that cannot be written is dropped, because a run outlives its terminal. Texts are printed as they are: no markup,
and control characters of a name have no effect on the terminal.
"""

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.status import Status
from rich.text import Text

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where there is no terminal (logs, CI, pipes)."""

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """A text whose control characters, except tabs and line breaks, are written as escapes."""
    return text.translate(_CONTROL)


def printable_line(text: str) -> str:
    """A text in one line, whose control characters are written as escapes."""
    return printable(text).replace("\n", "\\n").replace("\t", " ")


class _Stderr:
    """The stderr of the moment, closed or full or not."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # full or gone, closed in Python, never opened
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._file.flush()

    def isatty(self) -> bool:
        with suppress(ValueError, AttributeError):
            return bool(self._file.isatty())
        return False

    def fileno(self) -> int:
        return int(self._file.fileno())

    @property
    def encoding(self) -> str:
        return getattr(self._file, "encoding", None) or "utf-8"

    @property
    def _file(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # rich replaces stderr while a progress line is shown


console = Console(file=cast(IO[str], _Stderr()), highlight=False, markup=False, emoji=False)


def log(message: str) -> None:
    """Print one line of text on stderr, unwrapped and without markup."""
    console.print(printable(message), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    log(f"Warning: {message}")


class ProgressLine:
    """The progress line of one long job.

    Args:
        message: the text until the first update.
    """

    def __init__(self, message: str) -> None:
        self._status = Status(_one_line(message), console=console) if console.is_terminal else None
        self._printed_at = time.monotonic()
        if self._status is None:
            log(message)

    def update(self, message: str) -> None:
        """Replace the line; without a terminal, print it if the last one is `PLAIN_INTERVAL_S` old."""
        if self._status is not None:
            self._status.update(_one_line(message))
        elif time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = time.monotonic()
            log(message)

    def __enter__(self) -> "ProgressLine":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()


def _one_line(message: str) -> Text:
    return Text(printable_line(message))
