"""The lock of a run: one training at a time writes to a run's directory. Nothing here imports torch.

The file `lock` names the process that trains the run. That process holds an flock on the file, which the system releases
when it dies, and sets the file's time every few seconds: a machine that does not see the flock sees the time.
"""

import datetime
import errno
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from moelm.console import log
from moelm.errors import MoelmError
from moelm.runs.directory import RunDirectory

BEAT_S = 5.0
"""Seconds between two updates of the file's time."""

WATCH_S = 60.0
"""Seconds without an update after which the owner on another machine is considered dead."""

OLD_S = 600.0
"""Age of the file's time above which it is considered dead at once; a lower value would depend on synchronized clocks."""

RESTART_S = 30.0
"""Seconds that a process restarted by a launcher waits for the end of the one that it replaces."""

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Errors of file systems without flock."""


class Owner(NamedTuple):
    """The process that trains a run."""

    pid: int
    host: str
    boot: str
    """Identifies the machine and its last start."""
    launch: str
    """Shared by a launcher's processes and by those that replace them after a failure; empty without a launcher."""
    since: str
    """Local time."""
    token: str
    """Unique."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """The lock of a run, held by this process within a `with` block.

    Raises:
        MoelmError: on entry, if another process trains the run, or the directory cannot be written.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.path = run, run.lock
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self.owner = Owner(os.getpid(), platform.node(), boot_id(), _launch(), since, uuid.uuid4().hex)
        self._created = [folder for folder in (run.path, run.path.parent) if not folder.exists()]
        self._file = -1
        self._lost_to: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            while not self._acquire():
                time.sleep(0.05)
        except OSError as error:
            self._remove_created_folders()
            raise MoelmError(f"The run directory {self.run.path} cannot be written: {error.strerror}.") from error
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(BEAT_S)
        with suppress(OSError):  # a file that remains is taken over by the next owner
            if self._new_owner() is None:
                self.path.unlink()
        self._remove_created_folders()
        os.close(self._file)

    def check(self) -> None:
        """Refuse to continue after a takeover, which happens if this process was suspended or cut off from the file server.

        Raises:
            MoelmError: another process trains the run.
        """
        if self._lost_to is not None:
            raise MoelmError(f"{self.run.path} has been taken over by {self._lost_to}; this training ends without saving.")

    def _remove_created_folders(self) -> None:
        for folder in self._created:
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def _acquire(self) -> bool:
        """Take the lock; False if its file appeared or was removed meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not os.path.lexists(self.path)
        try:
            file = os.open(self.path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if is_new else os.O_NOFOLLOW), 0o666)
        except (FileExistsError, FileNotFoundError):
            return False
        try:
            if not self._may_own(file, is_new):
                return False
            content = json.dumps(self.owner._asdict()).encode()
            os.ftruncate(file, os.pwrite(file, content, 0))
            self._file, file = file, -1
            return True
        except OSError:
            if is_new:
                self.path.unlink()
            raise
        finally:
            if file >= 0:
                os.close(file)

    def _may_own(self, file: int, is_new: bool) -> bool:
        """Whether the last owner is dead; False if the file was removed meanwhile.

        Raises:
            MoelmError: it is not.
        """
        has_flock = self._flock(file)
        if is_new or not _is_at(file, self.path):
            return _is_at(file, self.path)
        previous = _read_owner(file)
        if previous is None or not self._replaces(previous):
            if not has_flock or (previous is not None and previous.boot != self.owner.boot):
                self._watch(file, previous)
            log(f"Taking over {self.run.path} from {previous or 'another process'}, which has died.")
        return _is_at(file, self.path)

    def _flock(self, file: int) -> bool:
        """Get the flock; False if the file system has none.

        Raises:
            MoelmError: another process has it.
        """
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                owner = _read_owner(file)
                # `refuse_if_locked` may have it for a moment.
                patience = RESTART_S if owner is not None and self._replaces(owner) else 0.2
                if time.monotonic() - started > patience:
                    raise _refusal(self.run, owner) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno in _NO_FLOCK:
                    return False
                raise

    def _replaces(self, owner: Owner) -> bool:
        """Whether a launcher has started this process after the failure of that one."""
        return bool(owner.launch) and owner.launch == self.owner.launch

    def _watch(self, file: int, owner: Owner | None) -> None:
        """Wait for an update of the file's time.

        Raises:
            MoelmError: there was one.
        """
        updated = os.fstat(file).st_mtime_ns
        if time.time() - updated / 1e9 > OLD_S:
            return
        by = owner or "another process"
        log(f"{self.run.path} is locked by {by}; waiting up to {WATCH_S:g} s to see whether that process is alive.")
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S))
            try:
                reopened = os.open(self.path, os.O_RDONLY)  # a file server is asked at each opening only
            except FileNotFoundError:
                return
            with os.fdopen(reopened) as again:
                if os.fstat(again.fileno()).st_mtime_ns != updated:
                    raise _refusal(self.run, owner)

    def _beat(self) -> None:
        while self._lost_to is None and not self._stop.wait(BEAT_S):
            with suppress(OSError):  # a file server that does not respond now may do so at the next time
                self._lost_to = self._new_owner()
                os.utime(self._file)

    def _new_owner(self) -> str | None:
        """Who has taken the lock from this process; None if nobody has."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            owner = _read_owner(file)
        finally:
            os.close(file)
        return None if owner is not None and owner.token == self.owner.token else str(owner or "another process")


def refuse_if_locked(run: RunDirectory) -> None:
    """Refuse a run that another process on this machine is training.

    Raises:
        MoelmError: naming that process.
    """
    try:
        file = os.open(run.lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return  # there is none, or taking it will report why it cannot be opened
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(run, _read_owner(file)) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    finally:
        os.close(file)


def _refusal(run: RunDirectory, owner: Owner | None) -> MoelmError:
    by = owner or "another process"
    return MoelmError(f"{run.path} is being trained by {by}; stop it, wait for its end, or choose another name=... .")


def _read_owner(file: int) -> Owner | None:
    """The owner in a lock file; None if it is empty or cut off, as after a kill or on a full disk."""
    try:
        return Owner(**json.loads(os.pread(file, 1 << 16, 0)))
    except (ValueError, TypeError):
        return None


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def boot_id() -> str:
    """Identifies the machine and its last start."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def _launch() -> str:
    identifier = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if identifier == "none" else identifier  # torchrun's default
