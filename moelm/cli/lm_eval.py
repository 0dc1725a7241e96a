"""`moelm lm-eval`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from moelm.cli.options import MAX_INT, AsJson, Checkpoint, RunPath, print_json, stdout_console
from moelm.errors import MoelmError


def lm_eval(
    run: RunPath,
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")],
    num_fewshot: Annotated[int | None, typer.Option(min=0, max=MAX_INT, help="Examples before each question.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MAX_INT, help="Maximum number of documents for each task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Requests in one forward pass.")] = 8,
    include: Annotated[Path | None, typer.Option(help="A folder with additional tasks as YAML files.")] = None,
    checkpoint: Checkpoint = "last",
    as_json: AsJson = False,
) -> None:
    """Score a run with lm-evaluation-harness."""
    if find_spec("lm_eval") is None:
        raise MoelmError("lm-eval needs the library lm_eval, which is not installed; moelm's extra `lm-eval` installs it.")
    from moelm.evaluation.harness import evaluate_tasks

    results = evaluate_tasks(run, tasks.split(","), checkpoint, num_fewshot, limit, batch_size, include)
    if as_json:
        keys = ("results", "groups", "versions", "n-shot", "n-samples")
        print_json({"run": run, "checkpoint": checkpoint} | {key: results[key] for key in keys if key in results})
        return
    print_results(results)


def print_results(results: dict[str, Any]) -> None:
    """Print the table of all metrics."""
    from rich.table import Table

    table = Table("task", "metric", "value", "±", box=None, header_style="")
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr,{kind}")
                table.add_row(task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    stdout_console().print(table)
