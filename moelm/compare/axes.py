"""The costs at which variants are compared: tokens, FLOPs, training time and money; their names and formats."""

from collections.abc import Callable, Mapping
from typing import Literal

from moelm.formats import dollars, duration, exponent, quantity

Axis = Literal["tokens", "flops", "seconds", "dollars"]

AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds", "dollars")
TIMED_AXES: tuple[Axis, ...] = ("seconds", "dollars")
"""Costs that vary between runs of equal work."""
AXIS_NAMES: Mapping[Axis, str] = {"tokens": "tokens", "flops": "FLOPs", "seconds": "wall-clock", "dollars": "dollars"}
_FORMATS: Mapping[Axis, Callable[[float], str]] = {
    "tokens": quantity,
    "flops": exponent,
    "seconds": duration,
    "dollars": dollars,
}
_UNITS: Mapping[Axis, str] = {"tokens": " tokens", "flops": " FLOPs", "seconds": "", "dollars": ""}


def format_cost(axis: Axis, cost: float) -> str:
    """A cost without the name of what is counted: `4.9M`, `1.2e15`, `8.5 min`, `$0.31`."""
    return _FORMATS[axis](cost)


def cost_with_unit(axis: Axis, cost: float) -> str:
    """A cost with its unit: `4.9M tokens`, `1.2e15 FLOPs`, `8.5 min`, `$0.31`."""
    return format_cost(axis, cost) + _UNITS[axis]
