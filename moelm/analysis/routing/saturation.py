"""Router saturation: how much of the routing was settled when, told by a run's earlier checkpoints.

Saturation at a checkpoint t is (1 / N) sum |E_t ∩ E_T| / k over N tokens, E_t being the k experts that a token visits at t,
and T the checkpoint that is looked at (Muennighoff et al. 2024, OLMoE, router saturation).

Shapes: M positions, K choices per token, L sparse layers.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moelm.analysis.routing.collect import deal_batches, draw_rows
from moelm.checkpoint import list_checkpoints, step_of
from moelm.config import MoEFFNConfig
from moelm.data.loader import Rows
from moelm.model import Transformer
from moelm.rundir import Opened, RunDirectory, load_run

TOKENS = 32_768
"""Read for each other checkpoint, by it and by the one looked at; more would tell the third digit."""


class Agreement(NamedTuple):
    """How two models route the same tokens."""

    tokens: int
    experts_L: NDArray[np.int64]
    """Experts in common, over all tokens."""
    first_L: NDArray[np.int64]
    """Tokens with the same first expert."""


@torch.no_grad()
def count_agreement(
    model: Transformer,
    other: Transformer,
    rows: Rows,
    tokens: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    mask: bool,
) -> Agreement:
    """Read the same rows, drawn by lot, with two models in evaluation; the processes of a launch share the batches."""
    counts = torch.zeros(1 + 2 * len(model.config.sparse_layers), dtype=torch.int64, device=device)
    for _, batch, counted in deal_batches(rows, draw_rows(rows, tokens, seed), device):
        segments_BT = batch.fragments_BT if mask else None
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours, theirs = (
                each(batch.tokens_BT, segments_BT, valid_BT=batch.valid_BT, last_only=True).routings
                for each in (model, other)
            )
        if not counted:
            continue
        counts[0] += batch.valid_N.sum()
        for at, layer in enumerate(sorted(ours)):
            our_MK, their_MK = (routings[layer].experts_NK[batch.valid_N] for routings in (ours, theirs))
            counts[1 + 2 * at] += (our_MK[:, :, None] == their_MK[:, None, :]).sum()
            counts[2 + 2 * at] += (our_MK[:, 0] == their_MK[:, 0]).sum()
    if dist.is_initialized():
        dist.all_reduce(counts)
    whole = counts.cpu().numpy()
    return Agreement(int(whole[0]), whole[1::2], whole[2::2])


def compare_checkpoints(directory: RunDirectory, run: Opened, step: int, tokens: int, seed: int) -> dict[int, Agreement]:
    """How the other checkpoints that a run still has route, by their step, oldest first.

    Args:
        run: opened at the checkpoint of `step`, which the others are compared with.
        tokens: about how many are read of each, `TOKENS` at most.
    """
    read = (run.rows, min(tokens, TOKENS), seed, run.device, run.dtype, run.config.data.document_mask)
    found = {}
    for number in map(step_of, list_checkpoints(directory.checkpoints)):
        if number != step:
            other, _, _ = load_run(directory.path, str(number), run.device)
            found[number] = count_agreement(run.model, other, *read)
    return found


def tell_saturation(found: dict[int, Agreement], at: int, ffn: MoEFFNConfig) -> dict[str, Any]:
    """What routing.json tells of one layer, the one at a place among the sparse ones, beside experts by lot."""
    return {
        "checkpoints": [
            {
                "step": step,
                "experts": float(counts.experts_L[at] / (counts.tokens * ffn.top_k)),
                "first": float(counts.first_L[at] / counts.tokens),
            }
            for step, counts in found.items()
        ],
        "uniform": {"experts": ffn.top_k / ffn.num_experts, "first": 1 / ffn.num_experts},
    }
