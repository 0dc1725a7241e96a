"""Losses over a whole split, overall, by domain and by document; bitwise equal on any number of processes.

Batches do not depend on the number of processes: rank r evaluates every batch i with i % size == r. Losses are summed by
fragment, in fragment order. (Under expert parallelism an expert computes rows of several batches at once, which can change
the last digit.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moelm.data.loader import Rows
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.model import Transformer
from moelm.model.forward import forward_batch
from moelm.runs.document_losses import DocumentLosses

EVAL_TOKENS = 8192
"""Tokens in one evaluation batch."""


class Score(NamedTuple):
    """How well a model predicts some text."""

    loss: float
    """Mean negative log-likelihood in nats per token, without balance losses."""
    bpb: float
    """Bits per UTF-8 byte, comparable across tokenizers."""
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
    dtype: torch.dtype,
    document_mask: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate every row of a split; the processes share the batches and all get the result.

    A sharded model needs all processes in every forward pass, so a process without a batch left repeats one.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    losses_F = np.zeros(len(rows.packing.document))
    per_batch = max(1, EVAL_TOKENS // rows.row_len)
    starts = range(0, len(rows), per_batch)
    for first in range(0, len(starts), ranks.size):
        counted = first + ranks.rank < len(starts)
        start = starts[first + ranks.rank if counted else first]
        batch = rows.batch(np.arange(start, min(start + per_batch, len(rows))))
        output = forward_batch(model, batch.to(device), dtype, document_mask=document_mask, losses=True)
        after_batch()
        if counted:
            assert output.losses is not None
            valid_N = batch.valid_N.numpy()
            losses_N = output.losses.each_N.double().cpu().numpy()
            np.add.at(losses_F, batch.fragments_BT.flatten().numpy()[valid_N], losses_N[valid_N])
    # Every fragment belongs to one rank and is zero on the others, so the sum is exact.
    losses_F = ranks.all_reduce_array(losses_F, device)
    model.train(was_training)
    return _summarize(losses_F, rows)


def _summarize(losses_F: NDArray[np.float64], rows: Rows) -> Evaluation:
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
