"""Initial weights from another run: which checkpoint, whether it fits, and loading it."""

from moelm.config import InitFromConfig, ModelConfig, RunConfig, differing
from moelm.console import log, warn
from moelm.data.loader import PreparedData
from moelm.distributed.ranks import Ranks
from moelm.model import Transformer
from moelm.runs.checkpoint import load_weights, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import check_data_tokenizer, effective_settings, load_run_config


def resolve_init_from(init_from: InitFromConfig | None, saved: RunConfig | None) -> InitFromConfig | None:
    """The source of initial weights, with its checkpoint as a step number.

    Args:
        saved: the config of a run that resumes; its resolved step is reused.

    Raises:
        MoelmError: no such run or checkpoint.
    """
    if init_from is None:
        return None
    resolved = saved.init_from if saved is not None else None
    if resolved is not None and resolved.run == init_from.run:
        return resolved if init_from.checkpoint in ("last", "best") else init_from
    path = RunDirectory.find(init_from.run).checkpoint(init_from.checkpoint)
    return init_from.model_copy(update={"checkpoint": str(step_of(path))})


def load_initial_weights(
    init_from: InitFromConfig, config: ModelConfig, data: PreparedData, model: Transformer, ranks: Ranks
) -> None:
    """Load the weights of another run, and warn of model settings that differ.

    Raises:
        MoelmError: another shape or tokenizer, or a config.yaml that is not the one of the weights.
    """
    run = RunDirectory.find(init_from.run)
    path = run.checkpoint(init_from.checkpoint)
    trained = load_run_config(run).model
    check_data_tokenizer(run, data.record)
    load_weights(path, model, ranks)
    log(f"Initial weights: {path}.")
    theirs, ours = (effective_settings(each) for each in (trained, config))
    for key in differing(theirs, ours):
        warn(f"model.{key} is {ours.get(key)} here, but the weights were trained with {theirs.get(key)} in {run.path}.")
