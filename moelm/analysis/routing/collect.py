"""One pass of a model over a sample of a split, counting what its routers do. The model is only ever asked, never changed.

Shapes: B rows, T positions, M valid positions, E experts, K choices, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moelm.analysis.routing.counts import UNIT, RoutingCounts, tally
from moelm.analysis.routing.layers import sparse_ffn
from moelm.data.loader import Batch, Rows
from moelm.evaluate import EVAL_TOKENS
from moelm.model import Transformer
from moelm.model.router import Routing


class Sample(NamedTuple):
    """What was counted, and of which text."""

    counts: RoutingCounts
    layers: list[int]
    """Numbers of the sparse layers."""
    domains: list[str]
    document_domains: NDArray[np.int64]
    """`(N,)`: domain of each counted document."""


@torch.no_grad()
def collect(
    model: Transformer, rows: Rows, tokens: int, seed: int, device: torch.device, dtype: torch.dtype, mask: bool
) -> Sample:
    """Count over rows drawn by lot, about `tokens` of them; the processes of a launch share the batches.

    Raises:
        MoelmError: a dense model, or one whose experts choose.
    """
    ffn = sparse_ffn(model.config)
    layers = model.config.sparse_layers
    drawn = draw_rows(rows, tokens, seed)
    fragments = np.concatenate([np.arange(rows.packing.row_starts[r], rows.packing.row_starts[r + 1]) for r in drawn])
    documents = np.unique(rows.packing.document[fragments])
    domain_of = rows.split.documents["domain"].astype(np.int64)
    counts = RoutingCounts.empty(
        len(documents), len(rows.split.domains), len(layers), ffn.num_experts, model.embedding.num_embeddings
    )
    document_of_fragment = torch.from_numpy(np.searchsorted(documents, rows.packing.document)).to(device)
    domain_of_document = torch.from_numpy(domain_of[documents]).to(device)
    was_training = model.training
    model.eval()
    for number, batch, counted in deal_batches(rows, drawn, device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(batch.tokens_BT, batch.fragments_BT if mask else None, valid_BT=batch.valid_BT)
        if counted:
            marks = _mark(batch, document_of_fragment, domain_of_document, seed + number)
            predicted_M = output.logits.argmax(dim=-1).flatten()[marks.valid_N]
            for layer, (_, routing) in enumerate(sorted(output.routings.items())):
                count_layer(counts, layer, routing, marks, predicted_M)
            count_tokens(counts, marks)
    model.train(was_training)
    counts.over_processes(device)
    return Sample(counts, layers, list(rows.split.domains), domain_of[documents])


def draw_rows(rows: Rows, tokens: int, seed: int) -> NDArray[np.int64]:
    """Numbers of rows, by lot, that hold about so many tokens; all where there are fewer."""
    wanted = -(-tokens // rows.row_len)
    drawn: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    return drawn


def deal_batches(rows: Rows, drawn: NDArray[np.int64], device: torch.device) -> Iterator[tuple[int, Batch, bool]]:
    """Number and rows of each batch of this process, and whether it counts.

    All processes get equally many: who has no batch left gets the last one again, uncounted.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    per_batch = max(1, EVAL_TOKENS // rows.row_len)
    batches = [drawn[start : start + per_batch] for start in range(0, len(drawn), per_batch)]
    for first in range(0, len(batches), world):
        number = min(first + rank, len(batches) - 1)
        yield number, rows.batch(batches[number]).to(device), first + rank < len(batches)


class Marks(NamedTuple):
    """What is known of the positions of a batch beside their routing."""

    valid_N: Tensor
    read_M: Tensor
    """Token that is read."""
    document_M: Tensor
    domain_M: Tensor
    follows_M: Tensor
    """Whether the position before is of the same fragment."""
    other_M: Tensor
    """Another position of the same domain, drawn by lot; itself where there is none."""


def _mark(batch: Batch, document_of_fragment: Tensor, domain_of_document: Tensor, seed: int) -> Marks:
    valid_N = batch.valid_N
    fragment_M = batch.fragments_BT.flatten()[valid_N]
    document_M = document_of_fragment[fragment_M]
    domain_M = domain_of_document[document_M]
    follows_M = torch.zeros_like(fragment_M, dtype=torch.bool)
    follows_M[1:] = fragment_M[1:] == fragment_M[:-1]
    generator = torch.Generator().manual_seed(seed)
    lots_M = torch.rand(len(fragment_M), generator=generator, dtype=torch.float64).to(domain_M.device)
    order_M = (domain_M + lots_M).argsort()  # by domain, inside it by lot
    other_M = torch.empty_like(order_M)
    other_M[order_M] = order_M.roll(1)
    alone_M = domain_M[other_M] != domain_M  # the first of each domain meets the last of the one before
    other_M = torch.where(alone_M, torch.arange(len(order_M), device=order_M.device), other_M)
    return Marks(valid_N, batch.tokens_BT.flatten()[valid_N], document_M, domain_M, follows_M, other_M)


def count_tokens(counts: RoutingCounts, marks: Marks) -> None:
    """What does not depend on the layer."""
    here_M = torch.arange(len(marks.domain_M), device=marks.domain_M.device)
    tally(counts.tokens, marks.domain_M)
    tally(counts.neighbours, marks.domain_M[marks.follows_M])
    tally(counts.shuffled_pairs, marks.domain_M[marks.other_M != here_M])


def count_layer(counts: RoutingCounts, layer: int, routing: Routing, marks: Marks, predicted_M: Tensor) -> None:
    """Add one layer's routing of one batch."""
    chosen_MK = routing.experts_NK[marks.valid_N]
    probs_ME = routing.probs_NE[marks.valid_N]
    top_k, domain_M = chosen_MK.shape[1], marks.domain_M

    def many(place_M: Tensor) -> Tensor:
        return place_M[:, None].expand(-1, top_k)

    tally(counts.documents[:, layer], many(marks.document_M), chosen_MK)
    tally(counts.first[:, layer], domain_M, chosen_MK[:, 0])
    tally(counts.by_input[layer], chosen_MK, many(marks.read_M))
    tally(counts.by_prediction[layer], chosen_MK, many(predicted_M))
    for a, b in ((a, b) for a in range(top_k) for b in range(top_k) if a != b):
        tally(counts.together[layer], chosen_MK[:, a], chosen_MK[:, b])
    here_M = torch.arange(len(domain_M), device=domain_M.device)
    for into, other_M, wanted_M in (
        (counts.repeated, (here_M - 1).clamp_min(0), marks.follows_M),
        (counts.shuffled, marks.other_M, marks.other_M != here_M),
    ):
        for kind, same_M in enumerate(_alike(chosen_MK, other_M)):
            tally(into[:, layer, kind], domain_M[same_M & wanted_M])
    left_M = probs_ME.scatter(1, chosen_MK, 0.0).amax(dim=-1)
    margin_M = probs_ME.gather(1, chosen_MK).amin(dim=-1) - left_M
    entropy_M = torch.special.entr(probs_ME.double()).sum(dim=-1)
    for sums, amount_M in ((counts.entropy, entropy_M), (counts.margin, margin_M.double())):
        whole_M = (amount_M / UNIT).round().long()
        added_G = torch.zeros(len(sums), dtype=torch.int64, device=whole_M.device).index_add_(0, domain_M, whole_M)
        sums[:, layer] += added_G.cpu().numpy()


def _alike(chosen_MK: Tensor, other_M: Tensor) -> Iterator[Tensor]:
    """Whether positions share the first expert with their others, and any expert."""
    others_MK = chosen_MK[other_M]
    yield chosen_MK[:, 0] == others_MK[:, 0]
    yield (chosen_MK[:, :, None] == others_MK[:, None, :]).flatten(1).any(dim=1)
