"""The sizes of a sweep: training tokens from the number of parameters; batch, steps, warmup and learning rate from both."""

from collections.abc import Sequence

from moelm.config import OptimConfig, RunConfig
from moelm.console import warn
from moelm.data.prepare import prepare
from moelm.data.shards import read_manifest
from moelm.errors import MoelmError
from moelm.formats import quantity
from moelm.model.flops import count_parameters

BATCH_EXPONENT = 0.571
"""The best batch grows with this power of the tokens, whatever the number of parameters (Li et al. 2025, "Step Law")."""

RATE_EXPONENTS = (-0.713, 0.307)
"""Powers of parameters and tokens that the best rate grows with in the standard parametrization (Li et al. 2025)."""


def active_without_embedding(config: RunConfig) -> int:
    """Active parameters outside embedding and head."""
    count = count_parameters(config.model)
    return count.active - count.embedding * (1 if config.model.tie_embeddings else 2)


def length_overrides(base: RunConfig, config: RunConfig, tokens_per_param: float) -> list[str]:
    """The `key=value` that give a size its number of training tokens, and what depends on it.

    The batch is that of the base config, at the base config's own number of tokens, times the ratio of tokens to the power
    `BATCH_EXPONENT`, rounded to whole rows; the warmup is the same part of the steps. With `model.parametrization: mup` the
    learning rate is that of the base config; otherwise it is that times the ratios of parameters and tokens to the powers
    `RATE_EXPONENTS`. What a size sets itself (`train.batch_tokens`, `optim.warmup_steps`, `optim.lr`, `optim.adamw.lr`) is
    kept.

    Args:
        base: the sweep's config without any size.
        config: the first variant in this size.

    Raises:
        MoelmError: there are fewer tokens than one batch has.
    """
    parameters = active_without_embedding(config)
    tokens = tokens_per_param * parameters
    more_tokens = tokens / (base.train.steps * base.train.batch_tokens)
    batch = config.train.batch_tokens
    if batch == base.train.batch_tokens:
        batch = max(1, round(batch * more_tokens**BATCH_EXPONENT / config.data.seq_len)) * config.data.seq_len
    steps = round(tokens / batch)
    if not steps:
        raise MoelmError(
            f"tokens_per_param is {tokens_per_param:g}, which gives {config.name} {tokens:,.0f} tokens, fewer than one "
            f"batch of {batch:,} has."
        )
    overrides = [f"train.batch_tokens={batch}", f"train.steps={steps}"]
    if config.optim.warmup_steps == base.optim.warmup_steps:
        overrides.append(f"optim.warmup_steps={round(base.optim.warmup_steps * steps / base.train.steps)}")
    if config.model.parametrization == "standard":
        of_parameters, of_tokens = RATE_EXPONENTS
        more_parameters = parameters / active_without_embedding(base)
        overrides += _lr_overrides(base.optim, config.optim, more_parameters**of_parameters * more_tokens**of_tokens)
    return overrides


def _lr_overrides(base: OptimConfig, size: OptimConfig, factor: float) -> list[str]:
    """Both learning rates of the base config times a factor, unless the size sets its own."""
    overrides = []
    if size.lr == base.lr:
        overrides.append(f"optim.lr={base.lr * factor:.4g}")
    if base.adamw.lr is not None and size.adamw.lr == base.adamw.lr:
        overrides.append(f"optim.adamw.lr={base.adamw.lr * factor:.4g}")
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


def warn_of_untransferred_changes(configs: Sequence[RunConfig]) -> None:
    """A warning if sizes differ in what `mup` does not transfer a learning rate over."""
    if not any(config.model.parametrization == "mup" for config in configs):
        return
    for name, values in (
        ("num_layers", sorted({config.model.num_layers for config in configs})),
        ("head_dim", sorted({config.model.size_per_head for config in configs})),
    ):
        if len(values) > 1:
            warn(
                f"The sizes differ in model.{name} ({', '.join(map(str, values))}); with parametrization: mup one learning "
                f"rate is for all widths, but for one {name}."
            )
