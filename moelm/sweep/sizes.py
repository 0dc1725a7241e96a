"""The sizes of a sweep: training tokens from the number of parameters; batch, steps and warmup from the tokens."""

from moelm.config import RunConfig
from moelm.console import warn
from moelm.data.prepare import prepare
from moelm.data.shards import read_manifest
from moelm.errors import MoelmError
from moelm.formats import quantity
from moelm.model.flops import count_parameters

BATCH_EXPONENT = 0.571
"""The best batch grows with this power of the tokens, whatever the number of parameters (Li et al. 2025, "Step Law")."""


def active_without_embedding(config: RunConfig) -> int:
    """Active parameters outside embedding and head."""
    count = count_parameters(config.model)
    return count.active - count.embedding * (1 if config.model.tie_embeddings else 2)


def length_overrides(base: RunConfig, config: RunConfig, tokens_per_param: float) -> list[str]:
    """The `key=value` that give a size its number of training tokens.

    The batch is that of the base config, at the base config's own number of tokens, times the ratio of tokens to the power
    `BATCH_EXPONENT`, rounded to whole rows; the warmup is the same part of the steps. What a size sets itself
    (`train.batch_tokens`, `optim.warmup_steps`) is kept.

    Args:
        base: the sweep's config without any size.
        config: the first variant in this size.

    Raises:
        MoelmError: there are fewer tokens than one batch has.
    """
    tokens = tokens_per_param * active_without_embedding(config)
    batch = config.train.batch_tokens
    if batch == base.train.batch_tokens:
        ratio = tokens / (base.train.steps * base.train.batch_tokens)
        batch = max(1, round(batch * ratio**BATCH_EXPONENT / config.data.seq_len)) * config.data.seq_len
    steps = round(tokens / batch)
    if not steps:
        raise MoelmError(
            f"tokens_per_param is {tokens_per_param:g}, which gives {config.name} {tokens:,.0f} tokens, fewer than one "
            f"batch of {batch:,} has."
        )
    overrides = [f"train.batch_tokens={batch}", f"train.steps={steps}"]
    if config.optim.warmup_steps == base.optim.warmup_steps:
        overrides.append(f"optim.warmup_steps={round(base.optim.warmup_steps * steps / base.train.steps)}")
    return overrides


def warn_of_repeated_data(config: RunConfig) -> None:
    """A warning if a run reads its training data more than once."""
    manifest = read_manifest(prepare(config.data)[0])
    assert manifest is not None
    tokens, available = config.train.steps * config.train.batch_tokens, manifest["splits"]["train"]["tokens"]
    if tokens > available:
        warn(
            f"{config.name} trains on {quantity(tokens)} tokens, {tokens / available:.1f} times its {quantity(available)} "
            "tokens of data; a loss on repeated data is not comparable with one on new data."
        )
