"""Launching several processes of one command on this machine, by torch's elastic launcher."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from moelm.console import log

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals by which users, launchers and schedulers ask a run to save and stop."""

GRACE_S = 120
"""Seconds that they have to do so before they are killed."""


def stop_signals() -> list[signal.Signals]:
    """Those of `STOP_SIGNALS` that are handled; not SIGHUP if it is ignored, as by nohup, which lets the terminal close."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def count_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(argv: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `python -m moelm ARGV` in several connected processes.

    Args:
        max_restarts: how often all are restarted when one fails; a run continues from its newest checkpoint.

    Returns:
        The exit code of the process that failed first; 128 + n after signal n.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cpus() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_S))
    logs = tempfile.TemporaryDirectory(prefix="moelm_", ignore_cleanup_errors=True)  # nothing is redirected to it
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        signals_to_handle=",".join([*(stop.name for stop in stop_signals()), "SIGQUIT"]),
        logs_specs=DefaultLogsSpecs(logs.name),
    )
    _silence_logger("torch.distributed.elastic")
    try:
        with logs:
            elastic_launch(config, sys.executable)("-m", "moelm", *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        log(f"moelm: Rank {rank} was ended by {name}; run the same command again to continue.")
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _silence_logger(library: str) -> None:
    """The processes print their own errors."""
    for name in logging.root.manager.loggerDict:
        if name.startswith(library):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def is_restart() -> bool:
    """Whether the launcher has restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
