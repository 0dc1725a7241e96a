"""Processes forked from a server that has torch and moelm imported, which saves seconds for each of them."""

import atexit
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "datasets",
        "moelm.analyze.report",
        "moelm.cli.app",
        "moelm.compare.report",
        "moelm.huggingface.export",
        "moelm.huggingface.importing",
        "moelm.sweep.execute",
        "moelm.train.setup",
        "tests.distributed.train_runs",
        "torch._dynamo",
    ]
)
Program = Callable[[], object]


class Process:
    """A program that runs in a process of its own.

    Args:
        program: a function that reads `sys.argv`.
        text: its standard input.
    """

    def __init__(
        self, program: Program, argv: Sequence[str], folder: Path, environment: Mapping[str, str], text: str = ""
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self._streams = [Path(self._temporary.name) / name for name in ("stdin", "stdout", "stderr")]
        for stream in self._streams:
            stream.write_text(text if stream.name == "stdin" else "", encoding="utf-8")
        self._argv = list(argv)
        self._process = SERVER.Process(target=_run, args=(program, self._argv, folder, dict(environment), self._streams))
        self._process.start()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def finish(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; after `timeout_s` it is killed."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._argv, timeout_s)
        _, out, err = (stream.read_text(encoding="utf-8") for stream in self._streams)
        self._temporary.cleanup()
        return subprocess.CompletedProcess(self._argv, self._process.exitcode, out, err)


def _run(program: Program, argv: list[str], folder: Path, environment: dict[str, str], streams: list[Path]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = argv
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        program()
    finally:
        atexit._run_exitfuncs()


def start_moelm(arguments: Sequence[str], folder: Path, text: str = "") -> Process:
    """Start `moelm ARGUMENTS` in a folder."""
    from moelm.cli.app import main

    return Process(main, ["moelm", *arguments], folder, os.environ, text)


def run_moelm(arguments: Sequence[str], folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run `moelm ARGUMENTS` in a folder."""
    return start_moelm(arguments, folder, text).finish()


def run_ranks(program: Program, argv: Sequence[str], folder: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Run a program in several connected processes, as a launcher does; returns the first that failed, otherwise rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    processes = [
        Process(program, argv, folder, {**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    done = [process.finish(500) for process in processes]
    return next((each for each in done if each.returncode), done[0])
