"""The directory of a run: finding it, and the paths of its files."""

from dataclasses import dataclass
from pathlib import Path

from moelm.errors import MoelmError


@dataclass(frozen=True)
class RunDirectory:
    """`runs/NAME/{config.yaml, environment.json, metrics.jsonl, documents.npz, tokenizer.json, checkpoints/}`."""

    path: Path

    @classmethod
    def find(cls, name: str | Path) -> "RunDirectory":
        """An existing run, by its path or by its name under `runs/`.

        Raises:
            MoelmError: there is no such run.
        """
        for path in (Path(name), Path("runs") / name):
            if (path / "config.yaml").is_file():
                return cls(path)
        raise MoelmError(f"There is no run {name}; a directory with a config.yaml, or a name under runs/, is expected.")

    @classmethod
    def new(cls, name: str) -> "RunDirectory":
        """A run to be created: a path, or a name, which is placed under `runs/`.

        Raises:
            MoelmError: something exists there.
        """
        path = Path(name) if "/" in name else Path("runs") / name
        if path.exists():
            raise MoelmError(f"{path} exists already; choose another name.")
        return cls(path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine, data fingerprints and model."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def documents(self) -> Path:
        """Losses of the validation documents at the last evaluation."""
        return self.path / "documents.npz"

    @property
    def tokenizer(self) -> Path:
        """A copy of the tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def lock(self) -> Path:
        """Names the process that trains the run; it exists while there is one, or if that process was killed."""
        return self.path / "lock"

    @property
    def wandb_id(self) -> Path:
        """The run's id at Weights & Biases and its name, if it is logged there."""
        return self.path / "wandb-id"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def require_new(self) -> None:
        """Refuse a run that exists.

        Raises:
            MoelmError: the run exists.
        """
        if self.config.exists():
            raise MoelmError(
                f"The run {self.path} exists already; choose another name=..., or --resume auto to continue it."
            )

    def checkpoint(self, which: str = "last") -> Path:
        """The path of a checkpoint: `last`, `best`, or a step number.

        Raises:
            MoelmError: there is no such checkpoint.
        """
        from moelm.runs.checkpoint import best_checkpoint, checkpoint_path, list_checkpoints, step_of

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
            available = f"it has those of steps {steps}" if saved else "it has none yet"
            raise MoelmError(f"The run {self.path} has no checkpoint {which!r}; {available}.")
        return found
