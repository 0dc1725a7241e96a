"""Branched runs: a run that starts from a checkpoint of another run, with which it shares the trajectory up to there.

The learning rate of `wsd` and `constant` does not depend on `train.steps` before the decay, so runs that differ in
`train.steps` alone are the same until the first of them decays.
"""

from typing import NamedTuple

from moelm.config import RunConfig, differing, trajectory_settings
from moelm.console import log
from moelm.data.identity import DataRecord
from moelm.distributed.ranks import Ranks
from moelm.errors import MoelmError
from moelm.formats import join_names
from moelm.model import Transformer
from moelm.runs.checkpoint import Progress, list_checkpoints, load_newest, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import load_run_config, read_data_record
from moelm.train.optimizer import Optimizer
from moelm.train.schedule import learning_rate


class BranchSource(NamedTuple):
    """The run that another one branches from."""

    run: RunDirectory
    config: RunConfig
    record: DataRecord | None
    """None for an imported or upcycled run that has not been trained."""


def open_branch_source(name: str) -> BranchSource:
    """The run to branch from, by its path or its name under `runs/`.

    Raises:
        MoelmError: there is none, or it is damaged.
    """
    run = RunDirectory.find(name)
    return BranchSource(run, load_run_config(run), read_data_record(run))


def check_branch_settings(config: RunConfig, source: BranchSource, prefix: str = "") -> None:
    """Refuse settings (of those with this prefix) with which a run has another trajectory than the one it branches from.

    Raises:
        MoelmError: naming the settings.
    """
    schedule = config.optim.schedule
    if schedule == "cosine":
        raise MoelmError(
            f"optim.schedule is {schedule}, whose learning rate depends on train.steps from the end of the warmup on; "
            "a run that branches from another one needs wsd or constant."
        )
    ours, theirs = (
        {key: value for key, value in trajectory_settings(each).items() if key.startswith(prefix) and key != "train.steps"}
        for each in (config, source.config)
    )
    if different := differing(ours, theirs):
        raise MoelmError(
            f"{config.name} cannot branch from {source.run.path}, which has another {', '.join(different[:3])}; only "
            "train.steps and settings that do not change the trajectory may differ."
        )


def shared_steps(config: RunConfig, other: RunConfig) -> int:
    """The number of steps after which two runs that differ in `train.steps` alone still have the same weights."""
    ends = config.train.steps, other.train.steps
    steps = range(min(ends))
    rates = ([learning_rate(step, end, config.optim) for step in steps] for end in ends)
    return next((step for step, (a, b) in enumerate(zip(*rates, strict=True)) if a != b), len(steps))


def load_branch_point(
    config: RunConfig, source: BranchSource, model: Transformer, optimizer: Optimizer, ranks: Ranks
) -> Progress:
    """Load the newest intact checkpoint of the other run that this run would have too.

    At least one step is left, so that the run ends with an evaluation of its own.

    Raises:
        MoelmError: there is none.
    """
    last = min(shared_steps(config, source.config), config.train.steps - 1)
    saved = ranks.broadcast(list_checkpoints(source.run.checkpoints))
    usable = [path for path in saved if 0 < step_of(path) <= last]
    progress = load_newest(usable, model, optimizer, ranks)
    if progress is None:
        steps = join_names([f"{step_of(path):,}" for path in saved])
        intact = "intact " if usable else ""
        raise MoelmError(
            f"{config.name} cannot branch from {source.run.path}, which has no {intact}checkpoint from step 1 to {last:,}, "
            f"up to which the two are the same (its checkpoints are of steps {steps or 'none'}); a smaller "
            "train.checkpoint_every or a larger train.keep_checkpoints of that run keeps one."
        )
    log(f"Branching from {source.run.path} at step {progress['step']:,}.")
    return progress
