"""One variant of a sweep in one size: its config, its runs and their command lines."""

from pathlib import Path
from typing import Any, NamedTuple

from moelm.config import RunConfig
from moelm.model.flops import count_flops, count_parameters
from moelm.runs.directory import RunDirectory


class SweepVariant(NamedTuple):
    """One side of the comparison, in one size, with its shape and number of steps."""

    label: str
    """`VARIANT`, or `VARIANT-SIZE` in a sweep with sizes."""
    variant: str
    size: str | None
    """None in a sweep without sizes."""
    overrides: list[str]
    """All its settings except name and seed."""
    config: RunConfig
    """The result, with the vocabulary size."""
    base: Path
    """The config file that they override."""
    runs: dict[int, RunDirectory]
    """By seed."""
    branch_steps: tuple[int, ...] = ()
    """Steps of the shorter runs that branch off each run."""

    @property
    def flops(self) -> int:
        """Training FLOPs of each run."""
        return self.config.train.steps * self.config.train.batch_tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token."""
        return count_flops(self.config.model, self.config.data.seq_len).training

    def branch(self, seed: int, steps: int) -> RunDirectory:
        """The shorter run of this many steps."""
        run = self.runs[seed].path
        return RunDirectory(run.with_name(f"{run.name}-{steps}"))

    @property
    def all_paths(self) -> list[Path]:
        """The directories of all runs, each followed by its branches."""
        return [
            path
            for seed, run in self.runs.items()
            for path in (run.path, *(self.branch(seed, steps).path for steps in self.branch_steps))
        ]

    def train_arguments(self, seed: int, steps: int | None = None) -> list[str]:
        """The command-line arguments of `moelm` that train one run, or a branch of it."""
        run, branch = self.runs[seed].path, []
        if steps is not None:
            branch = [f"train.steps={steps}", "--branch-from", str(run)]
            run = self.branch(seed, steps).path
        return ["train", str(self.base), *self.overrides, f"seed={seed}", f"name={run.name}", *branch]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        config, parameters = self.config, count_parameters(self.config.model)
        return {
            "label": self.label,
            "variant": self.variant,
            "size": self.size,
            "overrides": self.overrides,
            "hidden_dim": config.model.ffn.hidden_dim,
            "active": parameters.active,
            "total": parameters.total,
            "flops_per_token": self.flops_per_token,
            "steps": config.train.steps,
            "tokens": config.train.steps * config.train.batch_tokens,
            "flops": self.flops,
            "runs": [run.path.name for run in self.runs.values()],
            "branches": [self.branch(seed, steps).path.name for seed in self.runs for steps in self.branch_steps],
        }
