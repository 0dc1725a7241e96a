"""Training of several runs one after another in the same processes, because starting processes takes seconds.

Its arguments: CONFIG "KEY=VALUE|..." "KEY=VALUE|..."
"""

import sys
from pathlib import Path

from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from moelm.config import load_config
from moelm.runs.directory import RunDirectory
from moelm.train.setup import train


def main() -> None:
    """Train one run for each argument after the config; an argument is a list of overrides."""
    path, *runs = sys.argv[1:]
    for overrides in runs:
        config = load_config(path, overrides.split("|"))
        train(config, RunDirectory(Path("runs") / config.name))
        # DTensor keeps meshes of earlier runs, which equal a later one but have process groups that are gone.
        _clear_sharding_prop_cache()
