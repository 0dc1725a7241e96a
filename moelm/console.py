"""What people see while they wait: one live line on a terminal, a plain line now and then elsewhere. Always on stderr."""

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

console = Console(stderr=True, highlight=False)

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where there is no terminal (logs, CI, pipes)."""


class Ticker:
    """The progress line of one long job; the caller words it."""

    def __init__(self, opening: str) -> None:
        self._status = Status(opening, console=console) if console.is_terminal else None
        self._printed = time.monotonic()
        if self._status is None:
            console.print(opening, soft_wrap=True)

    def update(self, line: str) -> None:
        """Show the newest state of the job."""
        if self._status is not None:
            self._status.update(line)
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._printed = time.monotonic()
            console.print(line, soft_wrap=True, markup=False)

    def note(self, line: str) -> None:
        """Print a line that stays, above the live one."""
        console.print(line, soft_wrap=True, markup=False)

    def __enter__(self) -> "Ticker":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()


def short(number: float) -> str:
    """4,900,000 as 4.90M: three figures and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
