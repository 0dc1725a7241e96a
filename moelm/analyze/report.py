"""The report of `moelm analyze`: a directory with routing.json, routing.html and figures."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from moelm import __version__
from moelm.analyze.ablation.run import Extent, measure_ablations
from moelm.analyze.collect import collect_routing
from moelm.analyze.figures import routing_figures
from moelm.analyze.layers import sparse_ffn
from moelm.analyze.page import routing_page
from moelm.analyze.passages import Passage, sample_passages
from moelm.analyze.saturation import compare_checkpoints, layer_saturation
from moelm.analyze.summary import summarize
from moelm.analyze.token_experts import token_name
from moelm.atomic import atomic_directory, require_empty_directory
from moelm.distributed.ranks import distributed_context
from moelm.errors import MoelmError
from moelm.huggingface.opening import is_hf_directory, open_model
from moelm.runs.checkpoint import step_of
from moelm.runs.directory import RunDirectory


def analyze_run(
    name: str,
    out: Path,
    split: str,
    checkpoint: str,
    tokens: int,
    permutations: int,
    seed: int,
    ablate: Extent = "none",
    ablate_tokens: int = 32_768,
    data: Path | None = None,
    stream_layers: bool = False,
) -> dict[str, Any] | None:
    """Analyze the routing of a run on a random sample of a split, and write the report.

    Args:
        name: the run's directory, its name under `runs/`, or a directory in the Hugging Face format.
        out: a directory that does not exist yet, or is empty.
        split: `val` or `train`.
        checkpoint: `last`, `best` or a step number.
        tokens: approximate number of tokens in the sample.
        permutations: random permutations behind each p.
        seed: of the sample and of the permutations.
        ablate: what `moelm.analyze.ablation` measures.
        ablate_tokens: approximate number of tokens that it measures on, and that it removes experts on.
        data, stream_layers: see `moelm.huggingface.opening.open_model`.

    Returns:
        The contents of routing.json; None on all processes of a launch but the main one.

    Raises:
        MoelmError: a dense run, expert-choice routing, or a directory that cannot be written.
    """
    target = require_empty_directory(out)
    if stream_layers and ablate != "none":
        raise MoelmError(f"--ablate {ablate} runs parts of the model again and again; --stream-layers needs --ablate none.")
    run = open_model(name, checkpoint, split, data, stream_layers)
    ffn = sparse_ffn(run.config.model)
    directory = None if is_hf_directory(name) else RunDirectory.find(name)
    step = step_of(directory.checkpoint(checkpoint)) if directory else 0
    mask = run.config.data.document_mask
    with distributed_context() as ranks:
        sample = collect_routing(run.model, run.rows, tokens, seed, run.dtype, mask, ranks)
        ablation = None if ablate == "none" else measure_ablations(run, ablate, ablate_tokens, seed, ranks)
        agreements = compare_checkpoints(directory, run, step, tokens, seed, ranks) if directory else {}
        if not ranks.is_main:
            return None
    passages = sample_passages(run, tokens, seed)

    report: dict[str, Any] = {
        "moelm": __version__,
        "run": name,
        "checkpoint": checkpoint,
        "step": step,
        "split": split,
        "seed": seed,
        **summarize(sample, run.model, partial(token_name, run.tokenizer), permutations, seed),
        "ablation": ablation,
    }
    for index, layer in enumerate(report["layers"]):
        layer["saturation"] = layer_saturation(agreements, index, ffn)
    try:
        with atomic_directory(target) as work:
            _write(work, report, passages)
    except OSError as error:
        raise MoelmError(f"{out} cannot be written: {error.strerror}.") from error
    return report


def _write(folder: Path, report: dict[str, Any], passages: list[Passage]) -> None:
    """Write routing.json, the figures and routing.html."""
    (folder / "routing.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    figures = routing_figures(report)
    for figure in figures:
        (folder / figure.name).write_bytes(figure.light)
    page = routing_page(report, passages, figures)
    (folder / "routing.html").write_text(page, encoding="utf-8", errors="backslashreplace")
