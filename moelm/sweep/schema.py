"""What a sweep is, and how its YAML becomes a list of contestants."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from moelm.analysis.words import counted
from moelm.config import check_section, read_tree
from moelm.config.base import Config
from moelm.errors import MoelmError

Match = Literal["active_params", "flops_per_token", "total_params"]


class BudgetConfig(Config):
    """What each run may spend, in one currency; it decides the run's number of steps."""

    tokens: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    flops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Training FLOPs."""
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Training time; contestants are timed, taking turns, before the first of their runs begins."""

    @model_validator(mode="after")
    def _one(self) -> "BudgetConfig":
        given = [name for name in ("tokens", "flops", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"budget names {' and '.join(given) or 'nothing'}; one of tokens, flops, seconds is expected")
        return self


class SweepConfig(Config):
    """One sweep, as its YAML says it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Opens the names of its runs, `NAME-CONTESTANT-SEED`."""
    config: str
    """The config that all runs begin with, from this file's folder."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    """Each contestant is trained once with each; the first seed of all of them comes first."""
    contestants: dict[str, dict[str, Any] | None] = Field(default={})
    """By name: settings as on the command line, dotted; none is the config as it is. The first is the reference."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values by dotted setting; each combination is one more contestant."""
    match: Match | None = None
    """The axis on which `model.ffn.hidden_dim` makes the others equal to the first, within 1%."""
    budget: BudgetConfig | None = None
    """Default: `train.steps`, as the config has it."""


class Entrant(NamedTuple):
    """One side of the comparison, as the file names it."""

    label: str
    words: list[str]
    """Its settings as `key=value`."""


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's file.

    Raises:
        MoelmError: a missing or malformed file, or an unknown key, wrong type or value.
    """
    return check_section(SweepConfig, read_tree(path), str(path))


def entrants_of(sweep: SweepConfig) -> list[Entrant]:
    """Those that are named, then those of the grid.

    Raises:
        MoelmError: fewer than two, or two of one name.
    """
    named = [(label, settings or {}) for label, settings in sweep.contestants.items()]
    found = [Entrant(_clean(label), _words(settings)) for label, settings in [*named, *_points(sweep.grid)]]
    if len(found) < 2:
        raise MoelmError(f"The sweep {sweep.name} has {counted(len(found), 'contestant')}; at least two are expected.")
    labels = [entrant.label for entrant in found]
    if not all(labels):
        raise MoelmError(f"The sweep {sweep.name} has a contestant whose name holds no letter or digit.")
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise MoelmError(f"The sweep {sweep.name} has two contestants called {twice[0]}; give them names of their own.")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise MoelmError(f"The sweep {sweep.name} has the seeds {sweep.seeds}; each of them once is expected.")
    return found


def _points(grid: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not grid:
        return
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        yield "-".join(f"{key.rpartition('.')[2]}-{_told(value)}" for key, value in settings.items()), settings


def _told(value: Any) -> str:
    return str(value.get("kind", json.dumps(value)) if isinstance(value, dict) else value)


def _clean(label: str) -> str:
    """As a part of a run's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
