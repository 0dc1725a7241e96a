"""Progress and log messages, always on stderr: one live line on a terminal, occasional plain lines elsewhere.

Texts are printed as they are: no markup, and control characters of a name have no effect on the terminal.
"""

import time
from types import TracebackType

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


console = Console(stderr=True, highlight=False, markup=False, emoji=False)


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
