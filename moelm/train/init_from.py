"""Initial weights from another run: which checkpoint, whether it fits, and loading it."""

from moelm.config import InitFromConfig, ModelConfig, RunConfig, differing, flatten, load_config
from moelm.console import log, warn
from moelm.data.loader import PreparedData
from moelm.distributed.ranks import Ranks
from moelm.model import Transformer
from moelm.runs.checkpoint import load_weights, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.identity import check_data_tokenizer

WITHOUT_EFFECT = ("init_std", "max_seq_len", "ffn.balance", "ffn.capacity_factor")
"""Prefixes of model settings that do not change what given weights compute."""


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
        MoelmError: another shape or tokenizer.
    """
    run = RunDirectory.find(init_from.run)
    path = run.checkpoint(init_from.checkpoint)
    check_data_tokenizer(run, data.record)
    load_weights(path, model, ranks)
    log(f"Initial weights: {path}.")
    theirs, ours = (_effective_settings(each) for each in (load_config(run.config).model, config))
    for key in differing(theirs, ours):
        warn(f"model.{key} is {ours.get(key)} here, but the weights were trained with {theirs.get(key)} in {run.path}.")


def _effective_settings(model: ModelConfig) -> dict[str, object]:
    resolved = model.model_copy(update={"num_kv_heads": model.kv_heads, "head_dim": model.size_per_head})
    return {key: value for key, value in flatten(resolved).items() if not key.startswith(WITHOUT_EFFECT)}
