"""A sweep before it is trained, in a table and in JSON."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moelm.console import short
from moelm.model.counting import count_parameters
from moelm.sweep.plan import Entry, flops_per_token
from moelm.sweep.schema import SweepConfig


def render_sweep(console: Console, entries: Sequence[Entry]) -> None:
    """A line a contestant."""
    table = Table("contestant", box=None, header_style="")
    headings = ("hidden_dim", "active", "total", "FLOPs/token", "steps", "tokens", "FLOPs", "runs")
    for heading in headings:
        table.add_column(heading, justify="right")
    for entry in entries:
        told = _told(entry)
        amounts = [told[key] for key in ("active", "total", "flops_per_token", "steps", "tokens", "flops")]
        table.add_row(entry.label, str(told["hidden_dim"]), *map(short, amounts), str(len(entry.runs)))
    console.print(table)


def sweep_json(sweep: SweepConfig, entries: Sequence[Entry]) -> dict[str, Any]:
    """The contestants as plain values."""
    return {"name": sweep.name, "match": sweep.match, "contestants": [_told(entry) for entry in entries]}


def _told(entry: Entry) -> dict[str, Any]:
    config, counted = entry.config, count_parameters(entry.config.model)
    return {
        "label": entry.label,
        "settings": entry.words,
        "hidden_dim": config.model.ffn.hidden_dim,
        "active": counted.active,
        "total": counted.total,
        "flops_per_token": flops_per_token(config),
        "steps": config.train.steps,
        "tokens": config.train.steps * config.train.batch_tokens,
        "flops": entry.flops,
        "runs": [run.path.name for run in entry.runs.values()],
    }
