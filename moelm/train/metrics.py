"""The destinations of training metrics: metrics.jsonl, and Weights & Biases if configured."""

import os
from pathlib import Path
from typing import Any

from moelm.config import RunConfig
from moelm.errors import MoelmError
from moelm.runs.directory import RunDirectory
from moelm.runs.metrics import Line, MetricsFile


class MetricsLogger:
    """Writes metrics lines to all destinations.

    Args:
        resume_step: see `MetricsFile`.
        enabled: False on processes that write nothing.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, resume_step: int, enabled: bool) -> None:
        self._destinations = (MetricsFile(run.metrics, resume_step), Wandb(config, run.path)) if enabled else ()

    def write(self, line: Line) -> None:
        """Write one line."""
        for destination in self._destinations:
            destination.write(line)

    def close(self) -> None:
        """Close all destinations."""
        for destination in self._destinations:
            destination.close()


class Wandb:
    """Weights & Biases; with mode `disabled`, nothing is imported or written."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._run: Any = None
        if config.wandb.mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb.project,
                name=config.name,
                dir=str(folder),
                mode=config.wandb.mode,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(init_timeout=30),
            )
        except Exception as error:  # login, network and service errors have no common base class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MoelmError(
                f"wandb.mode is {config.wandb.mode}, but Weights & Biases cannot be used ({reason}); "
                "log in, or choose offline or disabled."
            ) from error

    def write(self, line: Line) -> None:
        """Log the scalars of one line."""
        if self._run is not None:
            scalars = {key: value for key, value in line.items() if isinstance(value, int | float)}
            self._run.log(scalars, step=line["step"])

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
