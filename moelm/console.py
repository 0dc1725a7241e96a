"""Progress and log messages, always on stderr: one live line on a terminal, occasional plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

console = Console(stderr=True, highlight=False)

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where there is no terminal (logs, CI, pipes)."""


def log(message: str) -> None:
    """Print one line of text on stderr, unwrapped and without markup."""
    console.print(message, soft_wrap=True, markup=False)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    log(f"Warning: {message}")


class ProgressLine:
    """The progress line of one long job.

    Args:
        message: the text until the first update.
    """

    def __init__(self, message: str) -> None:
        self._status = Status(message, console=console) if console.is_terminal else None
        self._printed_at = time.monotonic()
        if self._status is None:
            log(message)

    def update(self, message: str) -> None:
        """Replace the line; without a terminal, print it if the last one is `PLAIN_INTERVAL_S` old."""
        if self._status is not None:
            self._status.update(message)
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
