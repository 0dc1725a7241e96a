"""Starting and resuming a run: its processes, its data, its directory, its newest whole checkpoint."""

import json
from typing import Any, Literal

import torch

from moelm.checkpoint import (
    DamagedCheckpoint,
    Progress,
    clear_unfinished,
    fresh_progress,
    list_checkpoints,
    load_training,
)
from moelm.config import MoEFFNConfig, RunConfig, differing, dump_config, flatten, identity, load_config
from moelm.console import console
from moelm.data.loader import PreparedData, open_data
from moelm.data.prepare import prepare
from moelm.distributed.launcher import restarted
from moelm.distributed.layout import Layout, resolve_layout
from moelm.distributed.parallelize import parallelize
from moelm.distributed.watch import Watch
from moelm.distributed.world import World, joined
from moelm.errors import MoelmError
from moelm.evaluate import Evaluation
from moelm.hardware import compiles, dtype_of, keep_memory, pick_device, pick_precision
from moelm.model import Transformer, build_model
from moelm.model.transformer import initialise
from moelm.rundir import RunDirectory
from moelm.train.environment import describe_code, describe_environment
from moelm.train.optim import build_optimizer
from moelm.train.start import check_tokenizer, load_start, settle_start
from moelm.train.trainer import Trainer

Resume = Literal["auto", "never"]


def train(config: RunConfig, run: RunDirectory, resume: Resume = "auto", profile: bool = False) -> Evaluation | None:
    """Train a run from its start or from its newest whole checkpoint, on the processes of this launch.

    Args:
        profile: whether to trace a few steps into the run's directory.

    Returns:
        The last evaluation; None on all processes but the first.

    Raises:
        MoelmError: the name is taken by a run of another config, or unusable input; see `Trainer.fit`.
    """
    keep_memory()
    with joined(2 * config.parallel.timeout_s) as world:
        console.quiet = not world.first
        try:
            with Watch(world, config.parallel.timeout_s) as watch:
                evaluation = _train(config, run, resume, profile, world, watch)
        except MoelmError as error:
            error.told = not world.first_to_say(str(error))
            raise
        return evaluation if world.first else None


def _train(config: RunConfig, run: RunDirectory, resume: Resume, profile: bool, world: World, watch: Watch) -> Evaluation:
    """What each process does; one that is missed by the others is named."""
    try:
        trainer = _prepared(config, run, resume, world, watch)
        watch.touch()
        return trainer.fit(profile)
    except RuntimeError as error:
        # However a backend words it: a collective fails when another process is gone.
        if (lost := watch.explain()) is None:
            raise
        raise lost from error


def _prepared(config: RunConfig, run: RunDirectory, resume: Resume, world: World, watch: Watch) -> Trainer:
    """A trainer at the place where its run goes on."""
    layout = resolve_layout(config, world.size)
    data = _data(config, world)
    device = pick_device()
    saved = world.from_first(load_config(run.config) if world.first and run.config.exists() else None)
    config = _resolved(config, data.tokenizer.vocab_size, device, saved, world)
    _check_agreed(config, data, world)
    if saved is not None:
        _check_same(config, saved, run, "auto" if restarted() else resume)
    dtype = dtype_of(config.train.precision, device)
    model = build(config, device, dtype, layout)
    optimizer = build_optimizer(model, config.optim)
    progress = _resume(run, model, optimizer, world) if saved is not None else None
    if isinstance(config.model.ffn, MoEFFNConfig) and config.model.ffn.router.kind == "expert_choice":
        console.print(
            "Warning: with expert_choice a token's experts depend on the tokens after it, which leaks the future: "
            "losses are too good and the model cannot be sampled.",
            soft_wrap=True,
        )
    if progress is None and config.start is not None:
        load_start(config.start, config.model, data, model, world)
    if progress is None or "origin" in progress:
        if progress is not None:
            check_tokenizer(run, data)
        if world.first:
            _create(run, config, data, describe_environment(config, data, device, dtype, layout))
        progress = fresh_progress()
    if world.size > 1:
        console.print(f"{world.size} processes, {layout}.")
    return Trainer(config, run, data, model, optimizer, device, dtype, progress, world, layout, watch)


def build(config: RunConfig, device: torch.device, dtype: torch.dtype, layout: Layout) -> Transformer:
    """The model with its initial values, of which each process only ever holds its part."""
    torch.manual_seed(config.seed)
    alone = layout.size == 1
    model = build_model(config.model, config.seed, "cpu" if alone else "meta")
    parallelize(model, layout, config.parallel, device, dtype, compiles(config.parallel.compile, device))
    if alone:
        return model.to(device)
    model.to_empty(device=device)
    initialise(model, config.seed)
    return model


def _data(config: RunConfig, world: World) -> PreparedData:
    """Open the data; the first process prepares it if need be, and any who does not see its files does so again."""
    for turn in (True, False):
        if turn == world.first:
            folder, worked = prepare(config.data)
            if worked:
                console.print(f"The data was not prepared yet; it is now, in {folder}.", soft_wrap=True)
        world.wait()
    return open_data(config)


def _resolved(config: RunConfig, vocab_size: int, device: torch.device, saved: RunConfig | None, world: World) -> RunConfig:
    """Put figures for what was left open; a run that goes on keeps its precision, on whatever machine."""
    asked = config.model.vocab_size
    if asked is not None and asked < vocab_size:
        raise MoelmError(
            f"model.vocab_size is {asked}, but the tokenizer has {vocab_size} tokens; at least that is needed."
        )
    known = {"vocab_size": asked or vocab_size, "max_seq_len": config.max_seq_len}
    precision = config.train.precision
    if precision == "auto":
        precision = saved.train.precision if saved is not None else "auto"
    if precision == "auto":
        precision = world.from_first(pick_precision(device))
    return config.model_copy(
        update={
            "start": world.from_first(settle_start(config.start, saved) if world.first else None),
            "model": config.model.model_copy(update=known),
            "train": config.train.model_copy(update={"precision": precision}),
        }
    )


def _check_agreed(config: RunConfig, data: PreparedData, world: World) -> None:
    """All processes must be about to do the same."""
    mine = flatten(config) | {
        "data": data.data_fingerprint,
        "tokenizer": data.tokenizer_fingerprint,
        "moelm's code": describe_code(),
        "torch": torch.__version__,
    }
    everyone = world.gather(mine)
    for rank, other in enumerate(everyone):
        if different := differing(other, everyone[0]):
            key = different[0]
            raise MoelmError(
                f"Rank {rank} of {world.size} has another {', '.join(different[:3])} than rank 0 ({other.get(key)} "
                f"instead of {everyone[0].get(key)}); all processes of a run must have the same."
            )


def _check_same(config: RunConfig, begun: RunConfig, run: RunDirectory, resume: Resume) -> None:
    """A directory is only ever continued by its own run."""
    if resume == "never":
        run.must_be_new()
    saved, wanted = (identity(each) for each in (begun, config))
    if begun.train.precision == "auto":  # made of weights from elsewhere, and never trained
        saved["train.precision"] = wanted["train.precision"]
    if different := differing(saved, wanted):
        raise MoelmError(
            f"The run {run.path} exists already with another {', '.join(different[:3])}; choose another name=..., "
            "or give its own settings to --resume it."
        )


def _create(run: RunDirectory, config: RunConfig, data: PreparedData, environment: dict[str, Any]) -> None:
    """Lay out the directory; config.yaml comes last, for its presence says that the rest is there."""
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.metrics.unlink(missing_ok=True)
        data.tokenizer.save(run.tokenizer)
        run.environment.write_text(json.dumps(environment, indent=1), encoding="utf-8")
        work = run.config.with_suffix(".writing")
        work.write_text(dump_config(config), encoding="utf-8")
        work.replace(run.config)
    except OSError as error:
        raise MoelmError(f"The run directory {run.path} cannot be written: {error.strerror}.") from error


def _resume(run: RunDirectory, model: Transformer, optimizer: torch.optim.Optimizer, world: World) -> Progress | None:
    """Load the newest whole checkpoint, saying which; None when there is none yet."""
    if world.first:
        clear_unfinished(run.checkpoints)
    saved = world.from_first(list_checkpoints(run.checkpoints))
    for path in reversed(saved):
        try:
            progress = load_training(path, model, optimizer, world)
        except DamagedCheckpoint as error:
            console.print(f"Warning: {error} Falling back to the one before.", soft_wrap=True, markup=False)
            continue
        if "origin" in progress and path != saved[-1]:
            break  # going back to where the weights came from would be another run
        console.print(f"Resuming {run.path} from step {progress['step']:,}.", soft_wrap=True)
        return progress
    if saved:
        raise MoelmError(f"All checkpoints that {run.path} has made are damaged; choose another name=... to start again.")
    return None
