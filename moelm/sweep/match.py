"""Making contestants equal on one axis, so that what is left between them is their shape."""

from moelm.config import DenseFFNConfig, MoEFFNConfig, RunConfig
from moelm.errors import MoelmError
from moelm.model.counting import count_flops, count_parameters
from moelm.sweep.schema import Match

WITHIN = 0.01
"""Largest relative difference that counts as equal."""
ROUND = (64, 32, 16, 8, 4, 2, 1)
"""Hidden widths are multiples of the largest of these that is fine enough: kernels like round numbers."""
WORDS: dict[Match, str] = {
    "active_params": "active parameters",
    "flops_per_token": "FLOPs per token",
    "total_params": "total parameters",
}


def size_on(config: RunConfig, match: Match) -> int:
    """The size of a config on an axis; its vocabulary must be known."""
    if match == "flops_per_token":
        return count_flops(config.model, config.data.seq_len).training
    counted = count_parameters(config.model)
    return counted.active if match == "active_params" else counted.total


def matched_width(config: RunConfig, target: int, match: Match) -> int:
    """The hidden width with which a config comes within 1% of a target; its own where that does already.

    Raises:
        MoelmError: there is none.
    """
    ffn = config.model.ffn
    if _near(size_on(config, match), target):
        return ffn.hidden_dim
    narrow, wide = (size_on(_with_width(config, units), match) for units in (ffn.depth, 2 * ffn.depth))
    slope = (wide - narrow) / ffn.depth  # what is measured is linear in the width
    ideal = ffn.depth + (target - narrow) / slope
    tried: dict[int, int] = {}
    for step in ROUND:
        multiple = step * ffn.depth
        width = max(multiple, round(ideal / multiple) * multiple)
        tried[width] = size_on(_with_width(config, width), match)
        if _near(tried[width], target):
            return width
    best = min(tried, key=lambda width: abs(tried[width] - target))
    raise MoelmError(
        f"{config.name} cannot be made equal in {WORDS[match]} to the first contestant ({target:,}): "
        f"the nearest model.ffn.hidden_dim is {best}, which gives {tried[best]:,}, more than 1% away."
    )


def _near(value: int, target: int) -> bool:
    return abs(value - target) <= WITHIN * target


def _with_width(config: RunConfig, width: int) -> RunConfig:
    ffn: DenseFFNConfig | MoEFFNConfig = config.model.ffn.model_copy(update={"hidden_dim": width})
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn": ffn})})
