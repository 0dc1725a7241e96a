"""The destinations of training metrics: metrics.jsonl, and Weights & Biases if configured."""

import os
import uuid
from typing import Any

from moelm.atomic import atomic_file
from moelm.config import RunConfig
from moelm.console import warn
from moelm.errors import MoelmError, first_line
from moelm.runs.directory import RunDirectory
from moelm.runs.metrics import Line, MetricsFile, read_metrics


class MetricsLogger:
    """Writes metrics lines to all destinations.

    Args:
        resume_step: see `MetricsFile`.
        enabled: False on processes that write nothing.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, resume_step: int, enabled: bool) -> None:
        self._destinations = (MetricsFile(run.metrics, resume_step), Wandb(config, run)) if enabled else ()

    def write(self, line: Line) -> None:
        """Write one line."""
        for destination in self._destinations:
            destination.write(line)

    def close(self) -> None:
        """Close all destinations."""
        for destination in self._destinations:
            destination.close()


class Wandb:
    """Weights & Biases; with mode `disabled`, nothing is imported or written.

    A run that resumes is one W&B run. Steps that W&B does not have are logged from metrics.jsonl first: in offline mode all
    of them, because `wandb sync` may replace a run by the last directory with its id. Series are plotted against `step`.
    """

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        self._run: Any = None
        self._last_step = 0
        if config.wandb.mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb.project,
                name=config.name,
                id=_wandb_id(run, config.name),
                resume="allow",
                dir=str(run.path),
                mode=config.wandb.mode,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(init_timeout=30),
            )
            self._run.define_metric("*", step_metric="step")
            if self._run.resumed:
                self._last_step = int(self._run.summary.get("step", 0))
        except Exception as error:  # login, network and service errors have no common base class
            raise MoelmError(
                f"wandb.mode is {config.wandb.mode}, but Weights & Biases cannot be used ({first_line(error)}); "
                "log in, or choose offline or disabled."
            ) from error
        for line in read_metrics(run.metrics):
            self.write(line)

    def write(self, line: Line) -> None:
        """Log the numbers of one line, unless W&B has that step already."""
        if self._run is None or line["step"] <= self._last_step:
            return
        try:
            self._run.log(scalar_series(line))
        except Exception as error:  # as above
            warn(f"Weights & Biases has failed ({first_line(error)}); the rest is logged to metrics.jsonl only.")
            self._run = None

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # as above
                warn(f"Weights & Biases has failed ({first_line(error)}); metrics.jsonl is complete.")


def scalar_series(line: Line) -> Line:
    """The numbers of a line by the names of their series, such as `moe/layers/03/entropy` and `val/domains/NAME/loss`.

    The loads of single experts are left out, which would be a series for each expert of each layer.
    """
    series = {key: value for key, value in line.items() if isinstance(value, int | float)}
    groups = {f"val/domains/{name}": scores for name, scores in line.get("val/domains", {}).items()}
    groups |= {f"moe/layers/{row['layer']:02}": row for row in line.get("moe/layers", ())}
    for group, values in groups.items():
        series |= {f"{group}/{key}": value for key, value in values.items() if key not in ("layer", "load")}
    return series


def _wandb_id(run: RunDirectory, name: str) -> str:
    """The id of the W&B run, chosen at the first launch; a copy of the directory under another name gets its own.

    Raises:
        OSError: it cannot be stored.
    """
    stored = run.wandb_id.read_text(encoding="utf-8").split() if run.wandb_id.exists() else []
    if len(stored) == 2 and stored[1] == name:
        return stored[0]
    identifier = uuid.uuid4().hex[:12]
    with atomic_file(run.wandb_id) as work:
        work.write_text(f"{identifier} {name}\n", encoding="utf-8")
    return identifier
