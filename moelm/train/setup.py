"""Setting up a run, new or resumed: processes, data, config, model, optimizer, checkpoint."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from moelm.atomic import atomic_file
from moelm.config import (
    MoEFFNConfig,
    RunConfig,
    differing,
    dump_config,
    flatten,
    trajectory_settings,
)
from moelm.console import console, log, warn
from moelm.data.identity import DataRecord, check_record, folder_to_train_on
from moelm.data.loader import PreparedData, open_folder
from moelm.distributed.launcher import is_restart
from moelm.distributed.parallel_dims import ParallelDims, resolve_parallel_dims
from moelm.distributed.parallelize import parallelize
from moelm.distributed.ranks import Ranks, distributed_context
from moelm.distributed.watchdog import Watchdog
from moelm.errors import MoelmError
from moelm.evaluation.losses import Evaluation
from moelm.hardware import dtype_of, keep_memory, pick_device, pick_precision, should_compile, use_deterministic_kernels
from moelm.model import Transformer, build_model
from moelm.model.init import initialize, reset_norms_and_buffers
from moelm.model.moe.experts import check_grouped_kernel
from moelm.runs.checkpoint import (
    Progress,
    fresh_progress,
    list_checkpoints,
    load_newest,
    remove_unfinished,
    step_of,
)
from moelm.runs.directory import RunDirectory
from moelm.runs.environment import describe_code, describe_environment
from moelm.runs.identity import check_data_tokenizer, load_run_config, read_data_record
from moelm.runs.lock import RunLock
from moelm.runs.metrics import copy_metrics
from moelm.runs.record import LOSSY_NOTE
from moelm.train.branch import BranchSource, check_branch_settings, load_branch_point, open_branch_source
from moelm.train.init_from import load_initial_weights, resolve_init_from
from moelm.train.optimizer import Optimizer, build_optimizer
from moelm.train.trainer import Execution, Trainer, TrainState

Resume = Literal["auto", "never"]


def train(
    config: RunConfig,
    run: RunDirectory,
    resume: Resume = "auto",
    profile: bool = False,
    branch_from: str | None = None,
) -> Evaluation | None:
    """Train a run from the start or from its newest intact checkpoint, on the processes of this launch.

    Args:
        profile: whether to trace a few steps into the run's directory.
        branch_from: a run with which a run without checkpoints shares its first steps; see `moelm.train.branch`.

    Returns:
        The last evaluation; None on all processes but rank 0.

    Raises:
        MoelmError: the name belongs to a run of another config, or unusable input; see `Trainer.fit`.
    """
    keep_memory()
    if config.train.deterministic:
        use_deterministic_kernels(pick_device())
    with distributed_context(2 * config.parallel.timeout_s) as ranks:
        console.quiet = not ranks.is_main
        try:
            with _locked(run, ranks) as lock, Watchdog(ranks, config.parallel.timeout_s) as watchdog:
                evaluation = _train(config, run, resume, profile, branch_from, ranks, watchdog, lock)
        except MoelmError as error:
            error.reported = not ranks.first_to_report(str(error))
            raise
        return evaluation if ranks.is_main else None


@contextmanager
def _locked(run: RunDirectory, ranks: Ranks) -> Iterator[RunLock | None]:
    """Hold the run's lock on rank 0, which yields it; the others get None.

    Raises:
        MoelmError: on all processes, if another launch trains the run.
    """
    with ExitStack() as stack:
        with ranks.shared_outcome():
            lock = stack.enter_context(RunLock(run)) if ranks.is_main else None
        yield lock


def _train(
    config: RunConfig,
    run: RunDirectory,
    resume: Resume,
    profile: bool,
    branch_from: str | None,
    ranks: Ranks,
    watchdog: Watchdog,
    lock: RunLock | None,
) -> Evaluation:
    try:
        trainer = build_trainer(config, run, resume, branch_from, ranks, watchdog, lock)
        watchdog.heartbeat()
        return trainer.fit(profile)
    except RuntimeError as error:
        # Collectives fail when another process has died; the message depends on the backend.
        if (lost := watchdog.explain()) is None:
            raise
        raise lost from error


def build_trainer(
    config: RunConfig,
    run: RunDirectory,
    resume: Resume,
    branch_from: str | None,
    ranks: Ranks,
    watchdog: Watchdog,
    lock: RunLock | None,
) -> Trainer:
    """A trainer at step 0, at the run's newest intact checkpoint, or at one of the run that it branches from."""
    dims = resolve_parallel_dims(config, ranks.size)
    saved, record = _read_saved(run, ranks)
    if saved is not None:
        if resume == "never" and not is_restart():
            run.require_new()
        _check_same_settings(config, saved, run, prefix="data.")
    source = _open_source(branch_from, run, ranks)
    if source is not None:
        check_branch_settings(config, source, prefix="data.")
        data = _open_data(config, source.run, source.record, ranks)
    else:
        data = _open_data(config, run, record, ranks)
    device = pick_device()
    earlier = saved if source is None else source.config
    config = _resolve(config, data.tokenizer.vocab_size, device, earlier, ranks)
    _check_ranks_agree(config, data, ranks)
    if saved is not None:
        _check_same_settings(config, saved, run)
    if source is not None:
        check_branch_settings(config, source)
    dtype = dtype_of(config.train.precision, device)
    checkpoints = [] if saved is None else _finished_checkpoints(run, ranks)
    loaded = bool(checkpoints) or source is not None or config.init_from is not None
    model = build_parallel_model(config, device, dtype, dims, initial_weights=not loaded)
    optimizer = build_optimizer(model, config.optim, dtype)
    _warn_of_future_tokens(config)
    environment = describe_environment(config, data, device, dtype, dims)
    progress = _resume(run, checkpoints, model, optimizer, ranks) if checkpoints else None
    if source is not None:
        progress = load_branch_point(config, source, model, optimizer, ranks)
        environment["branched_from"] = {"run": str(source.run.path), "step": progress["step"]}
        if ranks.is_main:
            _create_directory(run, config, data, environment, source.run.metrics, progress["step"])
    elif progress is None or "origin" in progress:
        if progress is not None:
            check_data_tokenizer(run, data.record)
        elif config.init_from is not None:
            load_initial_weights(config.init_from, config.model, data, model, ranks)
        if ranks.is_main:
            _create_directory(run, config, data, environment)
        progress = fresh_progress()
    if ranks.size > 1:
        log(f"{ranks.size} processes, {dims}.")
    state = TrainState(model, optimizer, progress)
    return Trainer(config, run, data, state, Execution(device, dtype, ranks, dims, watchdog, lock))


def _warn_of_future_tokens(config: RunConfig) -> None:
    if isinstance(config.model.ffn, MoEFFNConfig) and config.model.ffn.router.kind == "expert_choice":
        warn(
            "with expert_choice the experts of a token depend on later tokens, which leaks the future: losses are too low, "
            "and the model cannot generate text."
        )


def build_parallel_model(
    config: RunConfig, device: torch.device, dtype: torch.dtype, dims: ParallelDims, initial_weights: bool = True
) -> Transformer:
    """The model; each process only ever holds its shard.

    Args:
        initial_weights: whether to draw them; otherwise they are yet to be loaded.
    """
    torch.manual_seed(config.seed)
    if device.type == "cuda" and dtype == torch.bfloat16:
        check_grouped_kernel(config.model, dims.ep)
    model = build_model(config.model, config.seed, "meta")
    parallelize(model, dims, config.parallel, device, dtype, should_compile(config.parallel.compile, device))
    model.to_empty(device=device)
    if initial_weights:
        initialize(model, config.seed)
    else:
        reset_norms_and_buffers(model)
    return model


def _read_saved(run: RunDirectory, ranks: Ranks) -> tuple[RunConfig | None, DataRecord | None]:
    """The config and the data that an existing run has recorded, as rank 0 reads them."""
    saved: tuple[RunConfig | None, DataRecord | None] = (None, None)
    with ranks.shared_outcome():
        if ranks.is_main and run.config.exists():
            saved = load_run_config(run), read_data_record(run)
    return ranks.broadcast(saved)


def _open_source(branch_from: str | None, run: RunDirectory, ranks: Ranks) -> BranchSource | None:
    """The run to branch from, as rank 0 reads it; None without one, and for a run that has checkpoints already."""
    source: BranchSource | None = None
    with ranks.shared_outcome():
        if ranks.is_main and branch_from is not None and not list_checkpoints(run.checkpoints):
            source = open_branch_source(branch_from)
    return ranks.broadcast(source)


def _open_data(config: RunConfig, run: RunDirectory, record: DataRecord | None, ranks: Ranks) -> PreparedData:
    """Open the data. Rank 0 prepares it if necessary, and other ranks do so if they do not see its files.

    Raises:
        MoelmError: on all processes; also if it is not the data of a run that resumes.
    """
    for main_turn in (True, False):
        with ranks.shared_outcome():
            if main_turn == ranks.is_main:
                folder, worked = folder_to_train_on(config.data, record)
                if record is not None:
                    check_record(run.path, record, config.data, folder)
                data = open_folder(config, folder)
    if data.lossy and not worked:  # otherwise the preparation has said so
        warn(f"the tokenizer {LOSSY_NOTE}")
    return data


def _resolve(config: RunConfig, vocab_size: int, device: torch.device, saved: RunConfig | None, ranks: Ranks) -> RunConfig:
    """Fill in settings that were left open; a resumed run keeps its precision on any machine."""
    requested = config.model.vocab_size
    if requested is not None and requested < vocab_size:
        raise MoelmError(
            f"model.vocab_size is {requested}, but the tokenizer has {vocab_size} tokens; at least that is expected."
        )
    model = {"vocab_size": requested or vocab_size, "max_seq_len": config.max_seq_len}
    precision = config.train.precision
    if precision == "auto" and saved is not None:
        precision = saved.train.precision
    if precision == "auto":
        # On several processes at once, the timing would be of all of them.
        precision = ranks.broadcast(pick_precision(device) if ranks.is_main else "fp32")
    return config.model_copy(
        update={
            "init_from": ranks.broadcast(resolve_init_from(config.init_from, saved) if ranks.is_main else None),
            "model": config.model.model_copy(update=model),
            "train": config.train.model_copy(update={"precision": precision}),
        }
    )


def _check_ranks_agree(config: RunConfig, data: PreparedData, ranks: Ranks) -> None:
    """Refuse processes that would not train the same run."""
    own = flatten(config) | {
        "data": data.record.data_fingerprint,
        "tokenizer": data.record.tokenizer_fingerprint,
        "moelm's code": describe_code(),
        "torch": torch.__version__,
    }
    main, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        if different := differing(other, main):
            key = different[0]
            raise MoelmError(
                f"Rank {rank} of {ranks.size} has another {', '.join(different[:3])} than rank 0 ({other.get(key)} "
                f"instead of {main.get(key)}); all processes of a run must have the same."
            )


def _check_same_settings(config: RunConfig, saved: RunConfig, run: RunDirectory, prefix: str = "") -> None:
    """Refuse to continue a run with settings (of those with this prefix) that change its trajectory."""
    before, now = (
        {key: value for key, value in trajectory_settings(each).items() if key.startswith(prefix)}
        for each in (saved, config)
    )
    if saved.train.precision == "auto" and not prefix:  # an imported run that has never been trained
        before["train.precision"] = now["train.precision"]
    if different := differing(before, now):
        raise MoelmError(
            f"The run {run.path} exists already with another {', '.join(different[:3])}; choose another name=..., "
            "or use its own settings to resume it."
        )


def _create_directory(
    run: RunDirectory,
    config: RunConfig,
    data: PreparedData,
    environment: dict[str, Any],
    metrics: Path | None = None,
    last_step: int = 0,
) -> None:
    """Create the files of a run; config.yaml is written last, because it marks a complete directory.

    Args:
        metrics: of the run that this one branches from, to be copied up to `last_step`.
    """
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.metrics.unlink(missing_ok=True)
        if metrics is not None:
            copy_metrics(metrics, run.metrics, last_step)
        shutil.copyfile(data.folder / "tokenizer.json", run.tokenizer)
        run.environment.write_text(json.dumps(environment, indent=1), encoding="utf-8")
        with atomic_file(run.config) as work:
            work.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise MoelmError(f"The run directory {run.path} cannot be written: {error.strerror}.") from error


def _finished_checkpoints(run: RunDirectory, ranks: Ranks) -> list[Path]:
    """The run's checkpoints, oldest first, as rank 0 sees them; unfinished ones are removed."""
    if ranks.is_main:
        remove_unfinished(run.checkpoints)
    return ranks.broadcast(list_checkpoints(run.checkpoints))


def _resume(run: RunDirectory, saved: list[Path], model: Transformer, optimizer: Optimizer, ranks: Ranks) -> Progress:
    """Load the newest intact one of the run's checkpoints."""
    progress = load_newest(saved, model, optimizer, ranks)
    # Restarting from imported weights would be another run.
    if progress is None or ("origin" in progress and progress["step"] != step_of(saved[-1])):
        raise MoelmError(f"All checkpoints that {run.path} has written are damaged; choose another name=... to start over.")
    log(f"Resuming {run.path} from step {progress['step']:,}.")
    return progress
