"""Ablations of a model on a sample of a split, and their results as routing.json has them."""

import math
import time
from typing import Any, Literal

import numpy as np

from moelm.analyze.ablation.capacity import num_passes, vary_capacity
from moelm.analyze.ablation.experts import DRAWS, ablate_experts
from moelm.analyze.ablation.routes import SAMPLED_ROUTES, replace_routes
from moelm.analyze.ablation.summary import (
    capacity_summary,
    count_effects,
    experts_summary,
    routes_summary,
)
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.collect import sample_rows
from moelm.analyze.layers import sparse_ffn
from moelm.console import ProgressLine
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.errors import MoelmError
from moelm.formats import duration
from moelm.runs.load import OpenedRun

Extent = Literal["none", "layers", "all"]
"""Nothing; each layer's routes, and the number of experts; or each expert of each layer too."""


class _Progress:
    """Counts units of work of one stage, and estimates the time that is left."""

    def __init__(self, line: ProgressLine, stage: str, units: int) -> None:
        self._line, self._stage, self._units = line, stage, units
        self._done, self._start = 0, time.monotonic()

    def advance(self) -> None:
        self._done += 1
        left = (time.monotonic() - self._start) / self._done * (self._units - self._done)
        self._line.update(f"{self._stage}: {self._done / self._units:.0%}, about {duration(left)} left")


def measure_ablations(
    run: OpenedRun, extent: Extent, tokens: int, seed: int, ranks: Ranks = SINGLE_PROCESS
) -> dict[str, Any]:
    """Measure what the loss of a model is without its experts, with other routes, and with fewer experts.

    Effects are measured on random rows, and removals of experts on as many other rows, so that they are not selected by
    their own outcome.

    Args:
        tokens: approximate number of tokens of each of the two samples.
        seed: of the samples and of the random routes.

    Returns:
        The key `ablation` of routing.json, with a list `layers`; the same on all processes.

    Raises:
        MoelmError: a dense model, expert choice, every token selects all experts, or there are too few rows.
    """
    ffn = sparse_ffn(run.config.model)
    if ffn.top_k == ffn.num_experts:
        raise MoelmError(
            f"Every token selects all {ffn.num_experts} experts of a layer, so no other could take the place of one; "
            "--ablate=none is expected."
        )
    numbers = sample_rows(run.rows, 2 * tokens, seed)
    if len(numbers) < 2:
        raise MoelmError(f"The split has {len(numbers)} row of {run.rows.row_len} tokens; --ablate needs at least 2.")
    mask = run.config.data.document_mask
    first, second = np.array_split(numbers, 2)
    effects = AblationText(run.model, run.rows, first, run.dtype, mask, ranks, min_batches=DRAWS)
    held_out = AblationText(run.model, run.rows, second, run.dtype, mask, ranks)
    per_rank = math.ceil(len(effects.batches) / ranks.size)
    layers = len(run.config.model.sparse_layers)
    with ProgressLine(f"Replacing the routes of {layers} layers on {effects.tokens.sum():,} tokens") as line:
        routes = replace_routes(effects, seed, _Progress(line, "Replacing routes", per_rank * layers).advance)
        experts = None
        usefulness = {"load": routes.load.sum(axis=-1).astype(np.float64)}
        if extent == "all":
            stage = f"Ablating {layers} x {ffn.num_experts} experts"
            experts = ablate_experts(effects, seed, _Progress(line, stage, per_rank * layers).advance)
            usefulness["ablation"] = experts.ablated[0].sum(axis=-1).astype(np.float64)
        passes = num_passes(ffn, len(usefulness))
        units = passes * math.ceil(len(held_out.batches) / ranks.size)
        capacity = vary_capacity(held_out, usefulness, seed, _Progress(line, "Removing experts", units).advance)
    by_layer: list[dict[str, Any]] = [{"layer": layer} for layer in run.config.model.sparse_layers]
    for layer, summary in zip(by_layer, routes_summary(routes, effects), strict=True):
        layer["routes"] = summary
    result: dict[str, Any] = {
        "extent": extent,
        "tokens": int(effects.tokens.sum()),
        "documents": len(effects.documents),
        "held_out_tokens": int(held_out.tokens.sum()),
        "sampled_routes": SAMPLED_ROUTES,
        **capacity_summary(capacity, held_out),
        "layers": by_layer,
    }
    if experts is not None:
        summaries = experts_summary(experts, routes, effects, seed)
        result |= {"draws": experts.draws, "effects": count_effects(summaries)}
        for layer, summary in zip(by_layer, summaries, strict=True):
            layer["experts"] = summary
    return result
