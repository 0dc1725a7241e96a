"""Messages on stderr are literal text."""

import io
import sys

import pytest

from moelm.console import ProgressLine, console, log, printable, printable_line


class Terminal(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True


NAME = "letters [/x] [red]a[/red] :smile: \x1b[31m\x9b"
SHOWN = "letters [/x] [red]a[/red] :smile: \\x1b[31m\\x9b"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "is_interactive", stream.isatty())
    log(NAME)
    with ProgressLine(NAME) as line:
        line.update(f"{NAME} again")
    printed = stream.getvalue()
    assert printed.count(SHOWN) >= 2
    assert "\x9b" not in printed


def test_control_characters_are_escaped() -> None:
    assert printable("a\x00\x1b\x7f\x85\tb\nc é") == "a\\x00\\x1b\\x7f\\x85\tb\nc é"
    assert printable_line("a\tb\nc\r") == "a b\\nc\\x0d"
