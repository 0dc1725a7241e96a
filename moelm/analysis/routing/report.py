"""`analyze`: the pass, the numbers, and the folder with routing.json, routing.html and pictures."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moelm import __version__
from moelm.analysis.page import Picture
from moelm.analysis.plots import in_both_lights
from moelm.analysis.routing.collect import collect
from moelm.analysis.routing.layers import sparse_ffn
from moelm.analysis.routing.page import routing_page
from moelm.analysis.routing.passages import read_passages
from moelm.analysis.routing.plots import draw_experts, draw_repetition, draw_saturation, draw_shares
from moelm.analysis.routing.saturation import compare_checkpoints, tell_saturation
from moelm.analysis.routing.summary import summarise
from moelm.analysis.routing.weights import expert_similarity
from moelm.checkpoint import step_of
from moelm.distributed.world import joined
from moelm.errors import MoelmError
from moelm.folders import free_folder, whole_folder
from moelm.rundir import RunDirectory, open_run


def analyze_run(
    name: str, out: Path, split: str, checkpoint: str, tokens: int, permutations: int, seed: int
) -> dict[str, Any] | None:
    """Look at the routing of a run over a sample of a split and write what was found.

    Args:
        name: the run's directory, or its name under `runs/`.
        out: a directory that does not exist yet, or is empty.
        tokens: about how many are read.
        permutations: shuffles behind each p.
        seed: of the sample and the shuffles.

    Returns:
        What routing.json holds; None on all processes of a launch but the first.

    Raises:
        MoelmError: a dense run, or a folder that is not to be written to.
    """
    folder = free_folder(out)
    run = open_run(name, checkpoint, split)
    directory = RunDirectory.find(name)
    step = step_of(directory.checkpoint(checkpoint))
    with joined() as world:
        sample = collect(run.model, run.rows, tokens, seed, run.device, run.dtype, run.config.data.document_mask)
        settled = compare_checkpoints(directory, run, step, tokens, seed)
        if not world.first:
            return None
    passages = read_passages(run, tokens, seed)
    ffn = sparse_ffn(run.config.model)

    def words(token: int) -> str:
        return run.tokenizer.decode([token]) or run.tokenizer.raw.id_to_token(token) or f"#{token}"

    told: dict[str, Any] = {
        "moelm": __version__,
        "run": name,
        "checkpoint": checkpoint,
        "step": step,
        "split": split,
        "seed": seed,
    }
    told |= summarise(sample, ffn.top_k, words, expert_similarity(run.model), permutations, seed)
    for at, layer in enumerate(told["layers"]):
        layer["saturation"] = tell_saturation(settled, at, ffn)
    try:
        with whole_folder(folder) as work:
            (work / "routing.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
            pictures = _pictures(told)
            for picture in pictures:
                (work / picture.name).write_bytes(picture.light)
            (work / "routing.html").write_text(routing_page(told, passages, pictures), encoding="utf-8")
    except OSError as error:
        raise MoelmError(f"{out} cannot be written: {error.strerror}.") from error
    return told


def _pictures(told: dict[str, Any]) -> list[Picture]:
    wanted: list[tuple[str, str, Callable[[dict[str, Any]], Figure]]] = [
        ("shares.png", "Share of each domain's assignments by expert", draw_shares),
        ("repetition.png", "Neighbours that share experts, by layer, beside chance", draw_repetition),
        ("experts.png", "Which experts serve the same tokens, and how alike their weights are", draw_experts),
    ]
    if told["layers"][0]["saturation"]["checkpoints"]:
        wanted.append(("saturation.png", "Choices that other checkpoints made too", draw_saturation))
    return [Picture(name, caption, *in_both_lights(partial(draw, told))) for name, caption, draw in wanted]


def render_routing(console: Console, told: dict[str, Any]) -> None:
    """A line a layer."""
    console.print(f"{told['tokens']:,} tokens of {told['documents']:,} documents in {len(told['domains'])} domains")
    table = Table(box=None, header_style="")
    headings = ("layer", "max/mean", "dead", "V", "p", "same first", "shuffled", "by lot", "entropy", "margin", "cosine")
    for heading in headings:
        table.add_column(heading, justify="right")
    for layer in told["layers"]:
        first, found = layer["repetition"]["first"], layer["association"].get("all")
        table.add_row(
            str(layer["layer"]),
            f"{layer['load_max_over_mean']:.2f}",
            str(len(layer["dead_experts"])),
            *((f"{found['cramers_v']:.3f}", f"{found['p']:.3g}") if found else ("–", "–")),
            *(f"{first[key]:.3f}" if first[key] is not None else "–" for key in ("all", "shuffled", "uniform")),
            f"{layer['entropy']['all']:.3f}",
            f"{layer['margin']['all']:.3f}",
            f"{layer['similarity']['mean']:.3f}" if layer["similarity"]["mean"] is not None else "–",
        )
    console.print(table)
    checkpoints = [layer["saturation"]["checkpoints"] for layer in told["layers"]]
    for same in zip(*checkpoints, strict=True):
        shares = " ".join(f"{layer['experts']:.3f}" for layer in same)
        uniform = told["layers"][0]["saturation"]["uniform"]["experts"]
        console.print(f"experts that were the same at step {same[0]['step']:,}, by layer: {shares} (by lot {uniform:.3f})")
