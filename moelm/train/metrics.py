"""Where training figures go: metrics.jsonl always, Weights & Biases when asked."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from moelm.config import RunConfig
from moelm.errors import MoelmError
from moelm.rundir import RunDirectory

Line = dict[str, Any]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in step order.

    Args:
        keep_to: a resumed run's last step; later lines belong to work that was lost and will be done again.
    """

    def __init__(self, path: Path, keep_to: int | None = None) -> None:
        try:
            if keep_to is not None and path.exists():
                kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= keep_to]
                work = path.with_suffix(".writing")
                work.write_text("".join(kept), encoding="utf-8")
                work.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, line: Line) -> None:
        """Append one line and hand it to the system, so that a killed process loses none.

        Raises:
            MoelmError: a full disk.
        """
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(Path(self._file.name), error) from error

    def close(self) -> None:
        """Close the file; what could not be written has been told of by then."""
        with suppress(OSError):
            self._file.close()


def _unwritable(path: Path, error: OSError) -> MoelmError:
    return MoelmError(
        f"{path} cannot be written ({error.strerror}); "
        "when that is mended, give the same command again to go on from the last checkpoint."
    )


def _whole_lines(path: Path) -> list[str]:
    """A kill can cut the last line short; it is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n")]


class Wandb:
    """Weights & Biases; with mode `disabled` nothing is imported or written."""

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
        except Exception as error:  # login, network and service errors share no base class
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MoelmError(
                f"wandb.mode is {config.wandb.mode}, but Weights & Biases cannot be used ({why}); "
                "log in, or choose offline or disabled."
            ) from error

    def write(self, line: Line) -> None:
        """Log the scalars of one metrics line."""
        if self._run is not None:
            scalars = {key: value for key, value in line.items() if isinstance(value, int | float)}
            self._run.log(scalars, step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class Log:
    """Every place that the figures of a run go to.

    Args:
        keep_to: see `MetricsFile`.
        silent: for the processes that leave writing to another.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, keep_to: int, silent: bool) -> None:
        self._places = () if silent else (MetricsFile(run.metrics, keep_to), Wandb(config, run.path))

    def write(self, line: Line) -> None:
        """One step's figures."""
        for place in self._places:
            place.write(line)

    def close(self) -> None:
        """Close all."""
        for place in self._places:
            place.close()
