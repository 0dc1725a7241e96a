"""A run's directory: where its files are, and how a finished run is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moelm.config import RunConfig, dump_config, load_config
from moelm.errors import MoelmError
from moelm.folders import whole_folder

if TYPE_CHECKING:
    import torch

    from moelm.data.loader import Rows
    from moelm.data.tokenizer import Tokenizer
    from moelm.model import Transformer


@dataclass(frozen=True)
class RunDirectory:
    """`runs/NAME/{config.yaml, environment.json, metrics.jsonl, documents.npz, tokenizer.json, checkpoints/}`."""

    path: Path

    @classmethod
    def find(cls, name: str | Path) -> "RunDirectory":
        """An existing run by its path, or by its name under `runs/`.

        Raises:
            MoelmError: there is none.
        """
        for path in (Path(name), Path("runs") / name):
            if (path / "config.yaml").is_file():
                return cls(path)
        raise MoelmError(f"There is no run {name}; a directory with a config.yaml, or a name under runs/, is expected.")

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """What the run ran on and with."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def documents(self) -> Path:
        """Losses of the validation documents at the last evaluation."""
        return self.path / "documents.npz"

    @property
    def tokenizer(self) -> Path:
        """The run's own copy."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @classmethod
    def new(cls, name: str) -> "RunDirectory":
        """A run that is to be made: a path, or a bare name, which then goes under `runs/`.

        Raises:
            MoelmError: there is something already.
        """
        path = Path(name) if "/" in name else Path("runs") / name
        if path.exists():
            raise MoelmError(f"{path} exists already; choose another name.")
        return cls(path)

    def must_be_new(self) -> None:
        """Refuse a run that is there already.

        Raises:
            MoelmError: it is.
        """
        if self.config.exists():
            raise MoelmError(
                f"The run {self.path} exists already; choose another name=..., or --resume auto to go on with it."
            )

    def checkpoint(self, which: str = "last") -> Path:
        """A checkpoint: `last`, `best`, or a step number."""
        from moelm.checkpoint import best_checkpoint, checkpoint_path, list_checkpoints, step_of

        saved = list_checkpoints(self.checkpoints)
        if which == "last":
            found = saved[-1] if saved else None
        elif which == "best":
            found = best_checkpoint(self.checkpoints)
        else:
            path = checkpoint_path(self.checkpoints, int(which)) if which.isdigit() else None
            found = path if path in saved else None
        if found is None:
            steps = ", ".join(str(step_of(path)) for path in saved)
            known = f"it has those of steps {steps}" if saved else "it has none yet"
            raise MoelmError(f"The run {self.path} has no checkpoint {which!r}; {known}.")
        return found


def create_run(
    run: RunDirectory,
    config: RunConfig,
    tokenizer: "Tokenizer",
    weights: "dict[str, torch.Tensor]",
    origin: dict[str, Any],
) -> None:
    """Make a run that has taken no step yet, of weights that are there already: whole or not at all.

    Args:
        weights: by the model's names for them; they are stored in their own dtypes.
        origin: where they come from, as JSON.

    Raises:
        MoelmError: it cannot be written.
    """
    from moelm.checkpoint import fresh_progress, save_checkpoint

    try:
        with whole_folder(run.path) as path:
            work = RunDirectory(path)
            work.checkpoints.mkdir()
            save_checkpoint(work.checkpoints, {"model": weights}, {**fresh_progress(), "origin": origin})
            tokenizer.save(work.tokenizer)
            work.metrics.touch()
            work.config.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise MoelmError(f"The run {run.path} cannot be written: {error}.") from error


class Opened(NamedTuple):
    """A run with one side of its data, on this process's device."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    config: RunConfig
    rows: "Rows"
    device: "torch.device"
    dtype: "torch.dtype"
    """What it computes in."""


def open_run(run: str | Path, checkpoint: str, split: str) -> Opened:
    """A trained model and the `train` or `val` side of its data, to be evaluated or looked at.

    Raises:
        MoelmError: no such run or checkpoint, a damaged one, or data that is not prepared.
    """
    from moelm.data.loader import open_data
    from moelm.hardware import dtype_of, keep_memory, pick_device

    keep_memory()
    device = pick_device()
    model, tokenizer, config = load_run(run, checkpoint, device)
    data = open_data(config)
    rows = data.val if split == "val" else data.train
    return Opened(model, tokenizer, config, rows, device, dtype_of(config.train.precision, device))


def load_run(
    run: str | Path, checkpoint: str = "last", device: "torch.device | str" = "cpu"
) -> "tuple[Transformer, Tokenizer, RunConfig]":
    """A trained model with its tokenizer and config.

    Args:
        run: a run's directory, or its name under `runs/`.
        checkpoint: `last`, `best` or a step number.

    Raises:
        MoelmError: no such run or checkpoint, or a damaged one.
    """
    from moelm.checkpoint import load_weights
    from moelm.data.tokenizer import Tokenizer
    from moelm.model import build_model

    directory = RunDirectory.find(run)
    config = load_config(directory.config)
    path = directory.checkpoint(checkpoint)
    tokenizer = Tokenizer.load(directory.tokenizer)
    model = build_model(config.model, config.seed)
    load_weights(path, model)
    return model.to(device).eval(), tokenizer, config
