"""Starting several processes of one command on this machine, by torch's elastic launcher, and ending as they end."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the launcher hands on to its processes, which then save and stop."""

GRACE_S = 120
"""Seconds that they have for it; then what is left of them is killed."""


def launch(words: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `python -m moelm WORDS` in several processes that know of each other.

    Args:
        max_restarts: how often all are started anew when one fails; a run goes on from its newest checkpoint.

    Returns:
        The exit code: that of the process which failed first, 128 and more after a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_S))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        signals_to_handle=SIGNALS,
    )
    _silence("torch.distributed.elastic")
    try:
        elastic_launch(config, sys.executable)("-m", "moelm", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"moelm: Rank {rank} was ended by {name}; give the same command again to go on.", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _silence(library: str) -> None:
    """The processes speak for themselves."""
    for name in logging.root.manager.loggerDict:
        if name.startswith(library):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def restarted() -> bool:
    """Whether the launcher started this process anew after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
