"""`moelm plan`."""

from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moelm.cli.options import AsJson, ConfigPath, Overrides, plain_table, print_json, stdout_console
from moelm.console import warn
from moelm.formats import byte_size, clock, exponent

if TYPE_CHECKING:
    from moelm.config import RunConfig
    from moelm.plan import Plan
    from moelm.plan.search import Candidate

TOP = 10
"""Layouts in the table without `--all`."""


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, max=2**20, help="Number of GPUs.")] = 1,
    device: Annotated[
        str, typer.Option(help="h100, h100-nvl, h100-pcie, h200, b200, a100, l40, l40s, l4 or 4090.")
    ] = "h100",
    show_all: Annotated[bool, typer.Option("--all", help="Show every layout, not only the ten best.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, time and layout. Counts parameters and FLOPs of a config without building it."""
    from moelm.config import load_config
    from moelm.plan import count_model, make_plan

    loaded = load_config(config, overrides or ())
    counts, run_config = count_model(loaded)
    if loaded.model.vocab_size is None and loaded.data.tokenizer.kind in ("char", "file"):
        warn(
            f"the vocabulary of a tokenizer of kind {loaded.data.tokenizer.kind} is not known from the config; "
            f"{run_config.model.vocab_size:,} tokens are assumed, and model.vocab_size=N assumes others."
        )
    made = make_plan(run_config, gpus, device)
    if as_json:
        print_json({"schema": 2, **counts, **made.as_dict()})
    else:
        _print_plan(counts, made, run_config, len(made.candidates) if show_all else TOP)


def _print_plan(counts: dict[str, Any], plan: "Plan", config: "RunConfig", shown: int) -> None:
    console = stdout_console()

    def print_line(line: str) -> None:
        console.print(line, soft_wrap=True)

    for key, value in counts.items():
        print_line(f"{key:28}{value:>28,}" if isinstance(value, int) else f"{key:28}{value:>28}")
    print_line(f"\nLayouts on {plan.gpus} x {plan.device}, {config.train.batch_tokens:,} tokens per step:")
    console.print(_layout_table(plan.candidates[:shown]))
    if shown < len(plan.candidates):
        print_line(f"... and {len(plan.candidates) - shown} more (--all)")
    best = plan.best
    settings = [f"parallel.{name}={size}" for name, size in best.strategy.dims.as_settings().items()]
    settings.append(f"parallel.activation_checkpointing={best.strategy.checkpointing}")
    if (rows := best.strategy.micro_batch_rows) != config.micro_batch_rows(plan.gpus):
        settings.append(f"train.micro_batch_tokens={rows * config.data.seq_len}")
    print_line(f"\nOne GPU of the {'fastest' if best.fits else 'smallest'} layout, {' '.join(settings)}:")
    console.print(_detail_table(best))
    print_line(_describe_optimizer(counts, best, config))
    if best.fits:
        print_line(f"Estimated time of {config.train.steps:,} steps: {clock(best.step_s * config.train.steps)}.")
    else:
        print_line("No layout fits; use more GPUs, fewer tokens per step, or a smaller model.")
    if best.strategy.needs_extra_forward(config):
        print_line("With several micro-batches, balance.scope=global needs an extra forward pass; scope=micro does not.")
    for assumption in plan.assumptions:
        print_line(f"Assumed: {assumption}.")


def _layout_table(candidates: list["Candidate"]) -> Table:
    table = plain_table(
        "", "dp_replicate", "dp_shard", "ep", "dense_shard", "checkpointing", "rows", "memory", "sent/step", "step", "MFU"
    )
    for rank, candidate in enumerate(candidates):
        dims = candidate.strategy.dims
        table.add_row(
            "too big" if not candidate.fits else "best" if rank == 0 else "",
            *map(str, (dims.dp_replicate, dims.dp_shard, dims.ep, dims.dense_mesh[1])),
            candidate.strategy.checkpointing,
            str(candidate.strategy.micro_batch_rows),
            byte_size(candidate.memory.total),
            byte_size(sum(candidate.traffic)),
            f"{candidate.step_s:.3g} s" if candidate.step_s >= 1 else f"{1e3 * candidate.step_s:.3g} ms",
            f"{candidate.mfu:.0%}",
        )
    return table


def _describe_optimizer(counts: dict[str, Any], candidate: "Candidate", config: "RunConfig") -> str:
    """The optimizer's FLOPs as a share of the model's, and its memory."""
    flops, memory = counts["optimizer_flops_per_step"], candidate.memory
    moments = f"{byte_size(memory.optimizer)} of moments"
    if not flops:
        return f"{config.optim.kind}: no matrix products, {moments}."
    share = flops / (counts["training_flops"] / config.train.steps)
    percent = f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"
    return (
        f"{config.optim.kind}: {exponent(flops)} FLOPs per step on all GPUs together, {percent} of the model's; {moments}. "
        "The update needs its memory when activations and gathered weights are freed."
    )


def _detail_table(candidate: "Candidate") -> Table:
    """Memory by purpose, next to the bytes sent by collective."""
    table = plain_table("memory", "", "sent/step", "")
    table.columns[2].justify = "left"
    memory = ((name, byte_size(amount)) for name, amount in candidate.memory._asdict().items())
    traffic = ((name, byte_size(amount)) for name, amount in candidate.traffic._asdict().items())
    for (use, used), (collective, sent) in zip_longest(memory, traffic, fillvalue=("", "")):
        table.add_row(use.replace("_", "-"), used, collective.replace("_", "-"), sent)
    return table
