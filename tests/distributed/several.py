"""Train several runs one after another in the same processes: run under a launcher, which costs its start only once.

torchrun --nproc-per-node N -m tests.distributed.several CONFIG "KEY=VALUE ..." "KEY=VALUE ..."
"""

import sys
from pathlib import Path

from moelm.config import load_config
from moelm.runs.directory import RunDirectory
from moelm.train.setup import train


def main() -> None:
    """Each word after the config is one run's settings."""
    path, *runs = sys.argv[1:]
    for settings in runs:
        config = load_config(path, settings.split("|"))
        train(config, RunDirectory(Path("runs") / config.name))


if __name__ == "__main__":
    main()
