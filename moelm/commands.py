"""What the shorter commands do with a run once its name is known; the command line only words it."""

import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelm.errors import MoelmError
from moelm.evaluate import Evaluation
from moelm.generate import Sampling

if TYPE_CHECKING:
    from moelm.analysis.compare import Comparison


def evaluate_run(name: str, split: str, checkpoint: str) -> Evaluation | None:
    """Score a run on a whole split; under torchrun the processes share the work, and all but the first return None."""
    from moelm.distributed.world import joined
    from moelm.evaluate import evaluate
    from moelm.rundir import open_run

    run = open_run(name, checkpoint, split)
    with joined() as world:
        evaluation = evaluate(run.model, run.rows, run.device, run.dtype, run.config.data.document_mask)
        return evaluation if world.first else None


def sample_and_show(
    name: str, checkpoint: str, prompts: Sequence[str], sampling: Sampling, layer: str, quiet: bool
) -> list[dict[str, Any]]:
    """Continue prompts and, unless quiet, show which experts of a layer the new tokens visit; returns that for JSON."""
    from rich.console import Console

    from moelm.analysis.routing.layers import sparse_ffn
    from moelm.analysis.routing.tokens import render_visits, sample_visits
    from moelm.rundir import load_run

    model, tokenizer, config = load_run(name, checkpoint)
    samples = sample_visits(model, tokenizer, prompts, sampling, layer)
    if not quiet:
        render_visits(Console(highlight=False), samples, sparse_ffn(config.model).num_experts)
    return [sample.as_dict() for sample in samples]


def compare_and_show(
    runs: Sequence[str],
    out: Path,
    force: bool = False,
    grouped: bool = False,
    prices: Sequence[float] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the report of a comparison and, unless quiet, print its table and verdict; returns report.json's content."""
    from moelm.analysis.report import compare_runs

    return _show_report(compare_runs(runs, out, force, grouped, prices, _command()), out, quiet)


def _show_report(comparison: "Comparison", out: Path, quiet: bool) -> dict[str, Any]:
    from rich.console import Console

    from moelm.analysis.report import render_table, report_json

    if not quiet:
        console = Console(highlight=False)
        render_table(console, comparison)
        console.print(f"\nReport: {out / 'report.html'}", soft_wrap=True)
    return report_json(comparison)


def _command() -> str:
    """What was typed."""
    return shlex.join(["moelm", *sys.argv[1:]])


def sweep_and_show(
    path: Path, overrides: Sequence[str], out: Path | None, processes: int, dry: bool, quiet: bool
) -> dict[str, Any]:
    """Train a sweep's runs and compare them; returns report.json's content or, of a dry run, its contestants."""
    from rich.console import Console

    from moelm.analysis.compare import compare
    from moelm.analysis.contestants import contestant
    from moelm.analysis.report import check_out, write_report
    from moelm.analysis.runs import read_runs
    from moelm.sweep.plan import plan_sweep
    from moelm.sweep.report import render_sweep, sweep_json
    from moelm.sweep.runs import train_all
    from moelm.sweep.schema import load_sweep

    sweep = load_sweep(path)
    out = out or Path("reports") / sweep.name
    check_out(out)
    entries = plan_sweep(path, sweep, overrides, processes)
    if not quiet:
        render_sweep(Console(highlight=False, width=None if sys.stdout.isatty() else 140), entries)
    if dry:
        return sweep_json(sweep, entries)
    train_all(entries, processes, sweep.budget)
    sides = [contestant(entry.label, read_runs([run.path for run in entry.runs.values()])) for entry in entries]
    comparison = compare(sides)
    write_report(comparison, out, _command())
    return _show_report(comparison, out, quiet)


def plan_and_show(
    path: Path, overrides: Sequence[str], gpus: int, device: str, everything: bool, quiet: bool
) -> dict[str, Any]:
    """Count a config and weigh its layouts on so many GPUs; unless quiet, print tables of both."""
    from rich.console import Console

    from moelm.config import load_config
    from moelm.model.counting import count_flops, count_parameters
    from moelm.plan import make_plan
    from moelm.plan.report import print_plan

    config = load_config(path, overrides)
    model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or config.data.tokenizer.vocab_size})
    config = config.model_copy(update={"model": model})
    parameters, flops = count_parameters(model), count_flops(model, config.data.seq_len)
    counts: dict[str, Any] = {
        "name": config.name,
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "parameters_embedding": parameters.embedding,
        "flops_per_token_forward": flops.forward,
        "flops_per_token_backward": flops.backward,
        "tokens": config.train.steps * config.train.batch_tokens,
        "training_flops": config.train.steps * config.train.batch_tokens * flops.training,
    }
    plan = make_plan(config, gpus, device)
    if not quiet:
        print_plan(Console(highlight=False, width=None if sys.stdout.isatty() else 140), counts, plan, config, everything)
    return {**counts, **plan.as_dict()}


def bench_and_show(
    words: Sequence[str], vary: str | None, rounds: int, peers: bool, prompts: int, quiet: bool
) -> list[dict[str, Any]]:
    """Time the configs among `words` with the settings among them and, unless quiet, print the table."""
    from rich.console import Console
    from rich.table import Table

    from moelm.bench import enter, run_contest
    from moelm.bench.jobs import Work
    from moelm.console import Ticker

    settings = [word for word in words if "=" in word]
    entries = enter([Path(word) for word in words if "=" not in word], settings, vary, peers)
    with Ticker("Starting the contestants …") as ticker:
        timings = run_contest(entries, Work(prompts), rounds, ticker.update)
    if not quiet:
        phases = list(timings[0].phases)
        table = Table("contestant", "precision", "allocator", box=None, header_style="")
        for heading in ("ms", *phases, "ratio", "tokens/s", "MFU", "peak MiB"):
            table.add_column(heading, justify="right")
        for timing in timings:
            told = timing.as_dict()
            table.add_row(
                timing.entry.name,
                told["precision"],
                "keeps" if timing.entry.keeps_memory else "default",
                *(f"{1e3 * seconds:,.1f}" for seconds in (told["step_s"], *timing.phases.values())),
                f"{timing.times(timings[0]):.2f}",
                f"{told['tokens_per_s']:,.0f}",
                f"{told['mfu']:.0%}" if timing.flops else "",
                f"{timing.memory / 2**20:,.0f}",
            )
        Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    return [timing.as_dict() for timing in timings]


def harness_and_show(
    name: str,
    tasks: Sequence[str],
    checkpoint: str,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    include: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """Run the lm-evaluation-harness on a run and, unless quiet, print its table; returns its results by task."""
    if find_spec("lm_eval") is None:
        raise MoelmError("lm-eval needs the library lm_eval, which is not installed; moelm's extra `lm-eval` brings it.")
    from rich.console import Console
    from rich.table import Table

    from moelm.interop.harness import evaluate_tasks

    results = evaluate_tasks(name, tasks, checkpoint, shots, limit, batch_size, include)
    if not quiet:
        table = Table("task", "metric", "value", "±", box=None, header_style="")
        for task, figures in results["results"].items():
            for key, value in figures.items():
                metric, _, kind = key.partition(",")
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    error = figures.get(f"{metric}_stderr,{kind}")
                    table.add_row(task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
        Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    kept = ("results", "groups", "versions", "n-shot", "n-samples")
    return {"run": name, "checkpoint": checkpoint} | {key: results[key] for key in kept if key in results}


def analyze_and_show(
    name: str, out: Path, split: str, checkpoint: str, tokens: int, permutations: int, seed: int, quiet: bool
) -> dict[str, Any] | None:
    """Write the report on a run's routing and, unless quiet, print its table; returns routing.json's content.

    Under torchrun the processes share the work, and all but the first return None.
    """
    from rich.console import Console

    from moelm.analysis.routing.report import analyze_run, render_routing

    told = analyze_run(name, out, split, checkpoint, tokens, permutations, seed)
    if told is not None and not quiet:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
        render_routing(console, told)
        console.print(f"\nReport: {out / 'routing.html'}", soft_wrap=True)
    return told
