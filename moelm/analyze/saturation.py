"""Router saturation: how far the routing of a run's other checkpoints agrees with the analyzed one.

Saturation at checkpoint t is (1 / N) sum |E_t ∩ E_T| / k over N tokens, where E_t are the k experts of a token at t, and T
is the analyzed checkpoint (Muennighoff et al. 2024, OLMoE, router saturation).

Shapes: M valid positions, K experts per token, L sparse layers.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from moelm.analyze.collect import rank_batches, sample_rows
from moelm.analyze.counts import Ints
from moelm.config import MoEFFNConfig
from moelm.data.loader import Rows
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.model import Transformer
from moelm.model.forward import forward_batch
from moelm.runs.checkpoint import list_checkpoints, step_of
from moelm.runs.directory import RunDirectory
from moelm.runs.load import OpenedRun, load_run

MAX_TOKENS = 32_768
"""Tokens read per checkpoint; more would improve the third digit only."""


class Agreement(NamedTuple):
    """Counts of how two models route the same tokens."""

    tokens: int
    experts_L: Ints
    """Experts in common, summed over tokens."""
    first_L: Ints
    """Tokens with the same first expert."""


@torch.no_grad()
def count_agreement(
    model: Transformer,
    other: Transformer,
    rows: Rows,
    tokens: int,
    seed: int,
    dtype: torch.dtype,
    document_mask: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Agreement:
    """Compare the routing of two models, in evaluation mode, on the same random rows; the processes share the batches."""
    device = model.embedding.weight.device
    counts = np.zeros(1 + 2 * len(model.config.sparse_layers), dtype=np.int64)
    for _, batch, counted in rank_batches(rows, sample_rows(rows, tokens, seed), device, ranks):
        ours, theirs = (
            forward_batch(each, batch, dtype, document_mask=document_mask, last_only=True).routings
            for each in (model, other)
        )
        if not counted:
            continue
        added = [batch.valid_N.sum()]
        for layer in sorted(ours):
            our_MK, their_MK = (routings[layer].experts_NK[batch.valid_N] for routings in (ours, theirs))
            added.append((our_MK[:, :, None] == their_MK[:, None, :]).sum())
            added.append((our_MK[:, 0] == their_MK[:, 0]).sum())
        counts += torch.stack(added).cpu().numpy()
    counts = ranks.all_reduce_array(counts, device)
    return Agreement(int(counts[0]), counts[1::2], counts[2::2])


def compare_checkpoints(
    directory: RunDirectory, run: OpenedRun, step: int, tokens: int, seed: int, ranks: Ranks = SINGLE_PROCESS
) -> dict[int, Agreement]:
    """Agreement of a run's other saved checkpoints with the analyzed one, by step, oldest first.

    Args:
        run: opened at the checkpoint of `step`.
        tokens: approximate number of tokens to read, at most `MAX_TOKENS`.
    """
    tokens, mask = min(tokens, MAX_TOKENS), run.config.data.document_mask
    agreements = {}
    for number in map(step_of, list_checkpoints(directory.checkpoints)):
        if number != step:
            other, _, _ = load_run(directory.path, str(number), run.device)
            agreements[number] = count_agreement(run.model, other, run.rows, tokens, seed, run.dtype, mask, ranks)
    return agreements


def layer_saturation(agreements: dict[int, Agreement], index: int, ffn: MoEFFNConfig) -> dict[str, Any]:
    """The saturation of one layer as routing.json has it, and its value under uniformly random routing.

    Args:
        index: of the layer, among the sparse layers.
    """
    return {
        "checkpoints": [
            {
                "step": step,
                "experts": float(agreement.experts_L[index] / (agreement.tokens * ffn.top_k)),
                "first": float(agreement.first_L[index] / agreement.tokens),
            }
            for step, agreement in agreements.items()
        ],
        "uniform": {"experts": ffn.top_k / ffn.num_experts, "first": 1 / ffn.num_experts},
    }
