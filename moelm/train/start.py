"""Beginning a run with the weights of another: which checkpoint that is, whether it fits, and loading it."""

from moelm.checkpoint import load_weights, step_of
from moelm.config import ModelConfig, RunConfig, StartConfig, differing, flatten, load_config
from moelm.console import console
from moelm.data.loader import PreparedData
from moelm.data.tokenizer import Tokenizer
from moelm.distributed.world import World
from moelm.errors import MoelmError
from moelm.model import Transformer
from moelm.rundir import RunDirectory

OTHER_MATTERS = ("init_std", "max_seq_len", "ffn.balance", "ffn.capacity_factor")
"""Settings of a model that do not decide what given weights compute."""


def settle_start(start: StartConfig | None, saved: RunConfig | None) -> StartConfig | None:
    """Where a run starts, by the number of a step: that with which it began, if it has begun.

    Args:
        saved: the config of a run that goes on.

    Raises:
        MoelmError: no such run or checkpoint.
    """
    if start is None:
        return None
    begun = saved.start if saved is not None else None
    if begun is not None and begun.run == start.run:
        return begun if start.checkpoint in ("last", "best") else start
    path = RunDirectory.find(start.run).checkpoint(start.checkpoint)
    return start.model_copy(update={"checkpoint": str(step_of(path))})


def check_tokenizer(run: RunDirectory, data: PreparedData) -> None:
    """Refuse to read a run's weights with other tokens.

    Raises:
        MoelmError: its tokenizer is not the data's.
    """
    if Tokenizer.load(run.tokenizer).content != data.tokenizer.content:
        raise MoelmError(
            f"The weights of {run.path} belong to another tokenizer than this data's; set data.tokenizer to "
            f"{{kind: file, path: {run.tokenizer}}}."
        )


def load_start(start: StartConfig, model: ModelConfig, data: PreparedData, built: Transformer, world: World) -> None:
    """Take the weights of another run, and tell where its model computes something else with them.

    Raises:
        MoelmError: another shape or tokenizer.
    """
    run = RunDirectory.find(start.run)
    path = run.checkpoint(start.checkpoint)
    check_tokenizer(run, data)
    load_weights(path, built, world)
    console.print(f"Starting with the weights of {path}.", soft_wrap=True, markup=False)
    theirs, ours = (_deciding(each) for each in (load_config(run.config).model, model))
    for key in differing(theirs, ours):
        told = f"model.{key} is {ours.get(key)} here and {theirs.get(key)} in {run.path}"
        console.print(f"Warning: {told}, whose weights were made for that.", soft_wrap=True, markup=False)


def _deciding(model: ModelConfig) -> dict[str, object]:
    full = model.model_copy(update={"num_kv_heads": model.kv_heads, "head_dim": model.size_per_head})
    return {key: value for key, value in flatten(full).items() if not key.startswith(OTHER_MATTERS)}
