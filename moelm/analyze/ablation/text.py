"""The sampled text of an ablation: batches, each token's document, and sums of losses by document.

Sums are integer multiples of `UNIT`, so that they do not depend on the number of processes.

Shapes: N tokens, D documents.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moelm.analyze.ablation.cached_pass import CachedPass
from moelm.analyze.collect import fragments_of
from moelm.analyze.counts import UNIT, Ints
from moelm.data.loader import Rows
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.evaluation.losses import EVAL_TOKENS
from moelm.model import Transformer


class AblationText:
    """Some rows of a split, in batches that a model reads.

    Args:
        numbers: of the rows.
        min_batches: that they are divided into, if there are as many rows.
    """

    def __init__(
        self,
        model: Transformer,
        rows: Rows,
        numbers: Ints,
        dtype: torch.dtype,
        document_mask: bool,
        ranks: Ranks = SINGLE_PROCESS,
        min_batches: int = 1,
    ) -> None:
        self.model, self.rows, self._dtype, self._document_mask, self.ranks = model, rows, dtype, document_mask, ranks
        self.device = model.embedding.weight.device
        documents_F = rows.packing.document
        fragments = fragments_of(rows, numbers)
        self.documents: Ints = np.unique(documents_F[fragments])
        """`(D,)`: numbers of the documents."""
        self.domains: Ints = rows.split.documents["domain"].astype(np.int64)[self.documents]
        """`(D,)`: the domain of each."""
        self.tokens: Ints = np.bincount(
            np.searchsorted(self.documents, documents_F[fragments]), weights=rows.packing.length[fragments]
        ).astype(np.int64)
        """`(D,)`: the tokens of each that are in the rows."""
        self._document_of_fragment = torch.from_numpy(np.searchsorted(self.documents, documents_F)).to(self.device)
        per_batch = max(1, min(EVAL_TOKENS // rows.row_len, len(numbers) // min_batches))
        self.batches = [numbers[start : start + per_batch] for start in range(0, len(numbers), per_batch)]

    def passes(self, available: dict[int, Tensor] | None = None) -> Iterator[tuple[int, CachedPass]]:
        """Number and forward pass of each batch of this process; `available` as in `CachedPass`."""
        for number in range(self.ranks.rank, len(self.batches), self.ranks.size):
            batch = self.rows.batch(self.batches[number]).to(self.device)
            yield number, CachedPass(self.model, batch, self._dtype, self._document_mask, available)

    def by_document(self, values_N: Tensor, cached: CachedPass) -> Ints:
        """Sums of a value of each token by document, `(D,)`, times `1 / UNIT`; padding is left out."""
        valid_N = cached.batch.valid_N
        document_M = self.document_of(cached)[valid_N]
        sums_D = torch.bincount(document_M, values_N[valid_N].double(), minlength=len(self.documents))
        units: Ints = (sums_D / UNIT).round().long().cpu().numpy()
        return units

    def document_of(self, cached: CachedPass) -> Tensor:
        """Index of each token's document, `(N,)`; that of padding has no meaning."""
        return self._document_of_fragment[cached.batch.fragments_BT.flatten()]
