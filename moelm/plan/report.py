"""A plan for the eye: counts, the layouts side by side, the best one in detail, and what the times rest on."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from moelm.config import RunConfig
from moelm.console import clock, short
from moelm.plan.search import Choice, Plan
from moelm.plan.traffic import ahead

SHOWN = 10
"""Layouts in the table unless all are asked for."""

KEEPS = {"none": "all", "selective": "all but hidden", "full": "layer inputs"}
"""What is kept for the backward pass, by `parallel.activation_checkpointing`."""


def print_plan(console: Console, counts: Mapping[str, Any], plan: Plan, config: RunConfig, everything: bool) -> None:
    """Print everything."""

    def say(line: str = "") -> None:
        console.print(line, soft_wrap=True)

    for key, value in counts.items():
        say(f"{key:28}{value:>28,}" if isinstance(value, int) else f"{key:28}{value:>28}")
    say(f"\nLayouts of {plan.gpus} x {plan.device}, {config.train.batch_tokens:,} tokens a step:")
    console.print(_layouts(plan.choices if everything else plan.choices[:SHOWN]))
    if len(plan.choices) > SHOWN and not everything:
        say(f"... and {len(plan.choices) - SHOWN} more (--all)")
    best = plan.best
    say(f"\nOne GPU of the {'best' if best.fits else 'smallest'}, {_settings(best)}:")
    console.print(_details(best))
    if best.fits:
        say(f"{config.train.steps:,} steps would take {clock(best.step_s * config.train.steps)}.")
    else:
        say("None fits: more GPUs, fewer tokens a step on each, or a smaller model are needed.")
    if ahead(config, best.setting):
        say("Cut into micro-batches, balance.scope global costs a forward pass ahead; scope micro does not.")
    for assumption in plan.assumptions:
        say(f"Assumed: {assumption}.")


def _layouts(choices: list[Choice]) -> Table:
    table = Table("", box=None, header_style="")
    for name in ("dp_replicate", "dp_shard", "ep", "keeps", "rows at once", "memory", "sent a step", "step", "MFU"):
        table.add_column(name, justify="left" if name == "keeps" else "right")
    for place, choice in enumerate(choices):
        table.add_row(
            "too big" if not choice.fits else "best" if place == 0 else "",
            *map(str, choice.setting.layout),
            KEEPS[choice.setting.checkpointing],
            str(choice.setting.micro_rows),
            _size(choice.memory.total),
            _size(sum(choice.traffic)),
            f"{choice.step_s:.3g} s" if choice.step_s >= 1 else f"{1e3 * choice.step_s:.3g} ms",
            f"{choice.mfu:.0%}",
        )
    return table


def _details(choice: Choice) -> Table:
    """What its memory is for, beside what it sends."""
    table = Table("memory", box=None, header_style="")
    table.add_column("", justify="right")
    table.add_column("sent a step")
    table.add_column("", justify="right")
    memory, traffic = list(choice.memory._asdict().items()), list(choice.traffic._asdict().items())
    for row, (kind, amount) in enumerate(memory):
        sent, bytes_sent = traffic[row] if row < len(traffic) else ("", None)
        table.add_row(kind, _size(amount), sent.replace("_", "-"), "" if bytes_sent is None else _size(bytes_sent))
    return table


def _size(amount: float) -> str:
    return f"{short(amount).replace('B', 'G')}B" if amount else "0"


def _settings(choice: Choice) -> str:
    """What to write on the command line."""
    words = [f"parallel.{name}={size}" for name, size in choice.setting.layout._asdict().items()]
    return " ".join([*words, f"parallel.activation_checkpointing={choice.setting.checkpointing}"])
