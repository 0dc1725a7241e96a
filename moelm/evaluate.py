"""Loss over a whole split, overall and per domain, equal to the last digit on any number of processes.

Batches are fixed, not the ranks' shares of them: rank r takes every batch i with i % world == r, so each batch meets the
same kernels wherever it runs. Sums are kept per fragment and added up in fragment order at the end. (Where experts are
dealt out they see the rows of several batches at once, which can change a last digit.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moelm.data.loader import Rows
from moelm.document_losses import DocumentLosses
from moelm.model import Transformer

EVAL_TOKENS = 8192
"""Tokens in one evaluation batch."""


class Score(NamedTuple):
    """How well a model predicts some text."""

    loss: float
    """Mean negative log-likelihood, nats per token; auxiliary losses are never in it."""
    bpb: float
    """Bits per UTF-8 byte, which compares models across tokenizers."""
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))


class Evaluation(NamedTuple):
    """Scores of a whole split."""

    overall: Score
    domains: dict[str, Score]
    documents: DocumentLosses

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        described = {
            "loss": self.overall.loss,
            "perplexity": self.overall.perplexity,
            "bpb": self.overall.bpb,
        }
        described |= {"tokens": self.overall.tokens, "bytes": self.overall.bytes}
        return described | {"domains": {name: score._asdict() for name, score in self.domains.items()}}


@torch.no_grad()
def evaluate(
    model: Transformer,
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype,
    document_mask: bool = False,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every row of a split; under torch.distributed the processes share the batches and all get the result.

    A model may be spread over them, so all make the same number of forward passes; who has no batch left does one again.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    losses_F = np.zeros(len(rows.packing.document))
    per_batch = max(1, EVAL_TOKENS // rows.row_len)
    starts = range(0, len(rows), per_batch)
    for first in range(0, len(starts), world):
        mine = first + rank < len(starts)
        start = starts[first + rank if mine else first]
        batch = rows.batch(np.arange(start, min(start + per_batch, len(rows)))).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            segments_BT = batch.fragments_BT if document_mask else None
            output = model(batch.tokens_BT, segments_BT, valid_BT=batch.valid_BT, targets_BT=batch.targets_BT)
        after_batch()
        if not mine:
            continue
        valid_N = batch.valid_N
        numbers = batch.fragments_BT.flatten()[valid_N].cpu().numpy()
        np.add.at(losses_F, numbers, output.losses.each_N[valid_N].double().cpu().numpy())
    if world > 1:
        # Every fragment belongs to one rank and is zero on the others: the sum is exact.
        shared = torch.from_numpy(losses_F).to(device)
        dist.all_reduce(shared)
        losses_F = shared.cpu().numpy()
    model.train(was_training)
    return _summarise(losses_F, rows)


def _summarise(losses_F: NDArray[np.float64], rows: Rows) -> Evaluation:
    table = rows.split.documents
    domain_F = table["domain"][rows.packing.document]
    count = len(rows.split.domains)
    nats = np.bincount(domain_F, weights=losses_F, minlength=count)
    tokens = np.bincount(domain_F, weights=rows.packing.length, minlength=count)
    seen, document_F = np.unique(rows.packing.document, return_inverse=True)
    sizes = np.bincount(table["domain"][seen], weights=table["bytes"][seen], minlength=count)
    domains = {
        name: _score(float(nats[i]), int(tokens[i]), int(sizes[i]))
        for i, name in enumerate(rows.split.domains)
        if tokens[i]
    }
    documents = DocumentLosses(
        numbers=seen.astype(np.int64),
        domains=table["domain"][seen].astype(np.int64),
        tokens=np.bincount(document_F, weights=rows.packing.length).astype(np.int64),
        nats=np.bincount(document_F, weights=losses_F).astype(np.float64),
        names=tuple(rows.split.domains),
    )
    return Evaluation(_score(float(nats.sum()), int(tokens.sum()), int(sizes.sum())), domains, documents)


def _score(nats: float, tokens: int, size: int) -> Score:
    return Score(nats / tokens, nats / math.log(2) / size, tokens, size)
