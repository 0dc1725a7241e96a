"""Routing counts of a model over a random sample of a split, collected in one pass.

Shapes: B rows, T positions, M valid positions, G domains, E experts, K experts per token.
"""

from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelm.analyze.counts import UNIT, Ints, RoutingCounts, add_counts
from moelm.analyze.layers import sparse_ffn
from moelm.data.loader import Batch, Rows
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.evaluation.losses import EVAL_TOKENS
from moelm.model import Routing, Transformer
from moelm.model.forward import forward_batch


class RoutingSample(NamedTuple):
    """Routing counts, and the layers and documents that were counted."""

    counts: RoutingCounts
    layers: list[int]
    """Indices of the sparse layers."""
    domains: list[str]
    """All domains of the split."""
    document_domains: Ints
    """`(N,)`: domain of each counted document."""


@torch.no_grad()
def collect_routing(
    model: Transformer,
    rows: Rows,
    tokens: int,
    seed: int,
    dtype: torch.dtype,
    document_mask: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> RoutingSample:
    """Count the routing of about `tokens` tokens in random rows; the processes share the batches and all get the sums.

    Raises:
        MoelmError: a dense model, or expert-choice routing.
    """
    device = model.embedding.weight.device
    ffn = sparse_ffn(model.config)
    layers = model.config.sparse_layers
    sampled = sample_rows(rows, tokens, seed)
    documents = np.unique(rows.packing.document[fragments_of(rows, sampled)])
    domain_of = rows.split.documents["domain"].astype(np.int64)
    counts = RoutingCounts.zeros(
        len(documents), len(rows.split.domains), len(layers), ffn.num_experts, model.embedding.num_embeddings
    )
    document_of_fragment = torch.from_numpy(np.searchsorted(documents, rows.packing.document)).to(device)
    domain_of_document = torch.from_numpy(domain_of[documents]).to(device)
    was_training = model.training
    model.eval()
    for number, batch, counted in rank_batches(rows, sampled, device, ranks):
        output = forward_batch(model, batch, dtype, document_mask=document_mask)
        if counted:
            assert output.logits is not None
            metadata = _token_metadata(batch, document_of_fragment, domain_of_document, seed + number)
            predicted_M = output.logits.argmax(dim=-1).flatten()[metadata.valid_N]
            _count_tokens(counts, metadata)
            for index, (_, routing) in enumerate(sorted(output.routings.items())):
                _count_layer(counts, index, routing, metadata, predicted_M)
    model.train(was_training)
    counts.all_reduce(ranks, device)
    return RoutingSample(counts, layers, list(rows.split.domains), domain_of[documents])


def sample_rows(rows: Rows, tokens: int, seed: int) -> Ints:
    """Numbers of random rows that hold about `tokens` tokens; all rows if there are fewer tokens."""
    wanted = -(-tokens // rows.row_len)
    sampled: Ints = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    return sampled


def fragments_of(rows: Rows, numbers: Ints) -> Ints:
    """Numbers of the fragments in the given rows."""
    starts = rows.packing.row_starts
    return np.concatenate([np.arange(starts[row], starts[row + 1]) for row in numbers])


def rank_batches(rows: Rows, numbers: Ints, device: torch.device, ranks: Ranks) -> Iterator[tuple[int, Batch, bool]]:
    """The batches of this process: the number of each batch, the batch, and whether it is to be counted.

    All processes get the same number of batches; one without a batch left gets the last batch again, not to be counted.
    """
    per_batch = max(1, EVAL_TOKENS // rows.row_len)
    batches = [numbers[start : start + per_batch] for start in range(0, len(numbers), per_batch)]
    for first in range(0, len(batches), ranks.size):
        number = min(first + ranks.rank, len(batches) - 1)
        yield number, rows.batch(batches[number]).to(device), first + ranks.rank < len(batches)


class _TokenMetadata(NamedTuple):
    """The tokens of a batch, and the two tokens that each is compared with."""

    valid_N: Tensor
    token_M: Tensor
    document_M: Tensor
    domain_M: Tensor
    previous_M: Tensor
    has_previous_M: Tensor
    """Whether the previous token is in the same fragment."""
    partner_M: Tensor
    """A random token of the same domain."""
    has_partner_M: Tensor
    """False for the first token of a domain in the random order, unless the batch has one domain."""


def _token_metadata(batch: Batch, document_of_fragment: Tensor, domain_of_document: Tensor, seed: int) -> _TokenMetadata:
    valid_N = batch.valid_N
    fragment_M = batch.fragments_BT.flatten()[valid_N]
    document_M = document_of_fragment[fragment_M]
    domain_M = domain_of_document[document_M]
    position_M = torch.arange(len(fragment_M), device=fragment_M.device)
    has_previous_M = torch.zeros_like(fragment_M, dtype=torch.bool)
    has_previous_M[1:] = fragment_M[1:] == fragment_M[:-1]
    generator = torch.Generator().manual_seed(seed)
    random_M = torch.rand(len(fragment_M), generator=generator, dtype=torch.float64).to(domain_M.device)
    order_M = (domain_M + random_M).argsort()  # by domain, in random order within each
    partner_M = torch.empty_like(order_M)
    partner_M[order_M] = order_M.roll(1)
    # The first token of each domain would be paired with the last one of the domain before.
    has_partner_M = (domain_M[partner_M] == domain_M) & (partner_M != position_M)
    return _TokenMetadata(
        valid_N,
        batch.tokens_BT.flatten()[valid_N],
        document_M,
        domain_M,
        (position_M - 1).clamp_min(0),
        has_previous_M,
        partner_M,
        has_partner_M,
    )


def _count_tokens(counts: RoutingCounts, metadata: _TokenMetadata) -> None:
    """Add the counts of one batch that do not depend on the layer."""
    add_counts(counts.tokens, metadata.domain_M)
    add_counts(counts.adjacent_pairs, metadata.domain_M[metadata.has_previous_M])
    add_counts(counts.shuffled_pairs, metadata.domain_M[metadata.has_partner_M])


def _count_layer(
    counts: RoutingCounts, layer: int, routing: Routing, metadata: _TokenMetadata, predicted_M: Tensor
) -> None:
    """Add one layer's routing of one batch."""
    experts_MK = routing.experts_NK[metadata.valid_N]
    probs_ME = routing.probs_NE[metadata.valid_N]
    domain_M = metadata.domain_M
    add_counts(counts.document_load[:, layer], metadata.document_M[:, None], experts_MK)
    add_counts(counts.first_experts[:, layer], domain_M, experts_MK[:, 0])
    add_counts(counts.by_input[layer], experts_MK, metadata.token_M[:, None])
    add_counts(counts.by_prediction[layer], experts_MK, predicted_M[:, None])
    for a, b in permutations(range(experts_MK.shape[1]), 2):
        add_counts(counts.coactivation[layer], experts_MK[:, a], experts_MK[:, b])
    for matches, other_M, exists_M in (
        (counts.adjacent_matches, metadata.previous_M, metadata.has_previous_M),
        (counts.shuffled_matches, metadata.partner_M, metadata.has_partner_M),
    ):
        others_MK = experts_MK[other_M]
        same_first_M = experts_MK[:, 0] == others_MK[:, 0]
        same_any_M = (experts_MK[:, :, None] == others_MK[:, None, :]).flatten(1).any(dim=1)
        add_counts(matches[:, layer, 0], domain_M[same_first_M & exists_M])
        add_counts(matches[:, layer, 1], domain_M[same_any_M & exists_M])
    highest_left_M = probs_ME.scatter(1, experts_MK, 0.0).amax(dim=-1)
    margin_M = probs_ME.gather(1, experts_MK).amin(dim=-1) - highest_left_M
    entropy_M = torch.special.entr(probs_ME.double()).sum(dim=-1)
    for sums, value_M in ((counts.entropy, entropy_M), (counts.margin, margin_M.double())):
        integer_M = (value_M / UNIT).round().long()
        added_G = torch.zeros(len(sums), dtype=torch.int64, device=integer_M.device).index_add_(0, domain_M, integer_M)
        sums[:, layer] += added_G.cpu().numpy()
