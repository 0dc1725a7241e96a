"""Matching of model sizes: the hidden width with which a config has the same parameters or FLOPs as another."""

from moelm.config import RunConfig
from moelm.errors import MoelmError
from moelm.model.flops import count_flops, count_parameters
from moelm.sweep.config import Match

TOLERANCE = 0.01
"""Largest relative difference that counts as equal."""
WIDTH_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
"""The hidden width is a multiple of the first of these with which it is within `TOLERANCE`; kernels are faster for it."""
MATCH_NAMES: dict[Match, str] = {
    "active_params": "active parameters",
    "flops_per_token": "FLOPs per token",
    "total_params": "total parameters",
}


def model_size(config: RunConfig, match: Match) -> int:
    """The size that `match` names; the config's vocabulary size must be known."""
    if match == "flops_per_token":
        return count_flops(config.model, config.data.seq_len).training
    count = count_parameters(config.model)
    return count.active if match == "active_params" else count.total


def matching_width(config: RunConfig, target: int, match: Match) -> int:
    """The hidden width with which a config's size is within 1% of a target; its own width if that already is.

    Raises:
        MoelmError: there is none.
    """
    ffn = config.model.ffn
    if _is_close(model_size(config, match), target):
        return ffn.hidden_dim
    # The size is linear in the width.
    once, twice = (model_size(_with_width(config, width), match) for width in (ffn.depth, 2 * ffn.depth))
    slope = (twice - once) / ffn.depth
    ideal = ffn.depth + (target - once) / slope
    sizes: dict[int, int] = {}
    for step in WIDTH_MULTIPLES:
        multiple = step * ffn.depth
        width = max(multiple, round(ideal / multiple) * multiple)
        sizes[width] = model_size(_with_width(config, width), match)
        if _is_close(sizes[width], target):
            return width
    best = min(sizes, key=lambda width: abs(sizes[width] - target))
    raise MoelmError(
        f"{config.name} cannot have as many {MATCH_NAMES[match]} as the first variant ({target:,}): "
        f"the nearest model.ffn.hidden_dim is {best}, with {sizes[best]:,}, more than 1% away."
    )


def _is_close(size: int, target: int) -> bool:
    return abs(size - target) <= TOLERANCE * target


def _with_width(config: RunConfig, width: int) -> RunConfig:
    ffn = config.model.ffn.model_copy(update={"hidden_dim": width})
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn": ffn})})
