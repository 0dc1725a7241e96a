"""How commands end: full and closed streams, and errors that nothing else has described."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moelm.cli.boundary import OutputClosed, OutputError, _Stderr, _Stdout, _text_stream, error_boundary
from moelm.console import ProgressLine, log, warn
from moelm.errors import MoelmError

CONFIG = Path(__file__).parents[2] / "configs/demo-moe.yaml"
FULL = "moelm: Standard output cannot be written: No space left on device.\n"


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    terminal, end = os.openpty()
    os.close(terminal)
    return end


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("config CONFIG > /dev/full", 2, FULL),
        ("--help > /dev/full", 2, FULL),
        ("config CONFIG > >(exec true); kill -0 $$", 0, ""),
        ("config CONFIG wandb.project=a 2> /dev/full | grep -c ^name", 0, ""),
        ("config CONFIG wandb.project=a 2>&- | grep -c ^name", 0, ""),
        ("config CONFIG >&-", 0, ""),
        ("config CONFIG <&-", 0, ""),
        ("config none.yaml 2> /dev/full", 2, ""),
        ("config CONFIG", 2, "moelm: The current directory cannot be used: No such file or directory.\n"),
    ],
)
def test_streams_that_cannot_be_written(command: str, code: int, error: str) -> None:
    gone = "cd $(mktemp -d) && rmdir $PWD; " if "directory" in error else ""
    line = f"{gone}set -o pipefail; {sys.executable} -m moelm {command.replace('CONFIG', str(CONFIG))}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_reader_that_leaves_ends_the_command_like_other_programs() -> None:
    writer = pipe_without_reader()
    done = subprocess.run([sys.executable, "-m", "moelm", "config", str(CONFIG)], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_a_stream_fails_once() -> None:
    stream = _text_stream(_Stdout("/dev/full", "w"), None, line_buffering=True)
    with pytest.raises(OutputError, match="No space left on device"):
        stream.write("a\n")
    stream.write("b\n")
    stream.close()
    stream = _text_stream(_Stdout(pipe_without_reader(), "w"), None, line_buffering=True)
    with pytest.raises(OutputClosed):
        stream.write("a\n")
    stream.close()


@pytest.mark.parametrize("open_stream", [full, pipe_without_reader, closed_terminal])
def test_messages_that_cannot_be_written_are_dropped(
    monkeypatch: pytest.MonkeyPatch, open_stream: Callable[[], int]
) -> None:
    number = open_stream()
    with pytest.raises(OSError, match=r"No space left|Broken pipe|Input/output error"):
        os.write(number, b"a")
    with _text_stream(_Stderr(number, "w"), None, line_buffering=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log("a")
        warn("b")
        with ProgressLine("c") as line:
            line.update("d")


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    for encoding, written in (("ascii", b"\\xe9\\u2026\\udce9"), ("utf-8", b"\xc3\xa9\xe2\x80\xa6\\udce9")):
        with _text_stream(_Stdout(tmp_path / "out", "w"), io.TextIOWrapper(io.BytesIO(), encoding), False) as stream:
            stream.write("é…\udce9")
        assert (tmp_path / "out").read_bytes() == written


def fail(error: BaseException) -> None:
    with error_boundary():
        raise error


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MoelmError("a name\nwith \x1b[31m color"), 2, "moelm: a name\\nwith \\x1b[31m color\n"),
        (KeyboardInterrupt(), 130, "moelm: interrupted.\n"),
        (KeyError("x"), 2, "moelm: an unexpected error ended the command (KeyError: 'x'; at "),
        (ValueError("two\nlines. "), 2, "(ValueError: two lines; at "),
        (ValueError("a" * 1000), 2, "(ValueError: " + "a" * 300 + "…; at "),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "moelm: a/b: No space left on device (OSError"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "moelm: Broken pipe (BrokenPipeError"),
        (MemoryError(), 2, "moelm: there is not enough memory (MemoryError: no message"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "moelm: there is not enough memory (RuntimeError"),
        (RecursionError("maximum depth"), 2, "moelm: the input is nested too deeply (RecursionError"),
    ],
)
def test_an_error_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    monkeypatch.delenv("MOELM_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        fail(error)
    printed = capsys.readouterr().err
    assert ended.value.code == code
    assert sentence in printed
    assert printed.count("\n") == 1
    if isinstance(error, Exception) and not isinstance(error, MoelmError):
        place = f"{Path(__file__).name}:{fail.__code__.co_firstlineno + 2}"
        assert printed.endswith(f"{place}); set MOELM_DEBUG=1 to see the traceback.\n")


def test_the_place_is_in_this_package(capsys: pytest.CaptureFixture[str]) -> None:
    from moelm.config.load import apply_overrides

    with pytest.raises(SystemExit), error_boundary():
        apply_overrides({}, [3])  # type: ignore[list-item]
    assert "; at moelm/config/load.py:" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MoelmError("wrong"), KeyError("x")])
def test_debugging_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("MOELM_DEBUG", "1")
    with pytest.raises(SystemExit) as ended:
        fail(error)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("Traceback (most recent call last):\n")
    assert "\nmoelm: " in printed


def test_one_of_several_processes_names_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        fail(KeyError("x"))
    assert "moelm: rank 3: an unexpected error" in capsys.readouterr().err
