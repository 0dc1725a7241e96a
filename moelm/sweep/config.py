"""The config of a sweep, and the variants that it lists."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moelm.config import check_section, format_override, read_tree
from moelm.config.base import Config, Seed
from moelm.errors import MoelmError
from moelm.formats import count_noun

Match = Literal["active_params", "flops_per_token", "total_params"]


class BudgetConfig(Config):
    """The cost of each run, in one unit; it determines the number of steps."""

    tokens: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    flops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Training FLOPs."""
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Training time; the variants' speed is measured before their first run starts."""

    @model_validator(mode="after")
    def _one(self) -> "BudgetConfig":
        given = [name for name in ("tokens", "flops", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"budget has {' and '.join(given) or 'no value'}; one of tokens, flops, seconds is expected")
        return self


class SweepConfig(Config):
    """One sweep, as in its YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Prefix of the names of its runs, `NAME-VARIANT-SEED`."""
    config: str
    """The config that all runs are based on, relative to this file."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """Every variant is trained once with each; all variants are trained with the first seed before the second."""
    variants: dict[str, dict[str, Any] | None] = Field(default={})
    """Settings by label and dotted key, as on the command line; empty is the config itself. The first is the reference."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values by dotted key; each combination is one more variant."""
    match: Match | None = None
    """The size in which the other variants equal the first within 1%, by the choice of `model.ffn.hidden_dim`."""
    budget: BudgetConfig | None = None
    """Default: the config's `train.steps`."""
    branches: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[])
    """Parts of the steps after which shorter runs of each variant end. They branch off the constant phase of the full run
    (`optim.schedule: wsd`), so each costs little more than its own decay, and are compared as lengths of one variant."""


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file.

    Raises:
        MoelmError: a missing or malformed file, an unknown key, a wrong type or an invalid value.
    """
    return check_section(SweepConfig, read_tree(path), str(path))


def variant_overrides(sweep: SweepConfig) -> dict[str, list[str]]:
    """The `key=value` overrides of each variant, by label: those of `variants`, then those of `grid`.

    Raises:
        MoelmError: fewer than two variants, an empty or repeated label, or a repeated seed.
    """
    listed = [*((label, settings or {}) for label, settings in sweep.variants.items()), *_grid_points(sweep.grid)]
    if len(listed) < 2:
        raise MoelmError(f"The sweep {sweep.name} has {count_noun(len(listed), 'variant')}; at least two are expected.")
    overrides: dict[str, list[str]] = {}
    for name, settings in listed:
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")  # it becomes a part of file names
        if not label:
            raise MoelmError(f"The sweep {sweep.name} has a variant {name!r}; a label with a letter or digit is expected.")
        if label in overrides:
            raise MoelmError(
                f"The sweep {sweep.name} has two variants with the label {label}; different ones are expected."
            )
        overrides[label] = [format_override(key, value) for key, value in settings.items()]
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise MoelmError(f"The sweep {sweep.name} has the seeds {sweep.seeds}; different ones are expected.")
    return overrides


def _grid_points(grid: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and settings of each combination."""
    if not grid:
        return
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        yield "-".join(f"{key.rpartition('.')[2]}-{_label(value)}" for key, value in settings.items()), settings


def _label(value: Any) -> str:
    return str(value.get("kind", json.dumps(value)) if isinstance(value, dict) else value)
