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


class SizeConfig(Config):
    """One size in which the variants are trained: its settings by dotted key, beside the keys below."""

    settings: dict[str, Any] = Field(default={})
    seeds: list[Seed] | None = Field(default=None, min_length=1)
    """Default: those of the sweep."""
    variants: list[str] | None = Field(default=None, min_length=1)
    """Labels of the variants that have this size; the first variant must be among them. Default: all."""

    @model_validator(mode="before")
    @classmethod
    def _collect_settings(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        own = {key: value for key, value in tree.items() if key in ("seeds", "variants")}
        return {**own, "settings": {key: value for key, value in tree.items() if key not in own}}


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
    sizes: dict[str, SizeConfig] = Field(default={})
    """By label, the smallest first: every variant is trained in each, which makes the comparison a ladder."""
    match: Match | None = None
    """The size in which the other variants equal the first within 1%, by the choice of `model.ffn.hidden_dim`."""
    match_ratio: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    """By label: the size that `match` gives a variant, relative to the first. Default: 1."""
    budget: BudgetConfig | None = None
    """Default: the config's `train.steps`."""
    tokens_per_param: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Training tokens of each size per active parameter of its first variant outside embedding and head; it determines
    batch, steps and warmup (`moelm.sweep.sizes`)."""
    branches: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[])
    """Parts of the steps after which shorter runs of each variant end. They branch off the constant phase of the full run
    (`optim.schedule: wsd`), so each costs little more than its own decay, and are compared as lengths of one variant."""

    @model_validator(mode="after")
    def _consistent(self) -> "SweepConfig":
        if self.tokens_per_param is not None and not self.sizes:
            raise ValueError("tokens_per_param is set, but there are no sizes")
        if self.tokens_per_param is not None and self.budget is not None:
            raise ValueError("budget and tokens_per_param both determine the number of steps; one of them is expected")
        if self.match_ratio and self.match is None:
            raise ValueError("match_ratio is set, but there is no match")
        return self


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file.

    Raises:
        MoelmError: a missing or malformed file, an unknown key, a wrong type or an invalid value.
    """
    return check_section(SweepConfig, read_tree(path), str(path))


def variant_overrides(sweep: SweepConfig) -> dict[str, list[str]]:
    """The `key=value` overrides of each variant, by label: those of `variants`, then those of `grid`.

    Raises:
        MoelmError: fewer than two variants, or an empty or repeated label.
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
