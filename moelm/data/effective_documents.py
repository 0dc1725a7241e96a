"""How certain an evaluation can be: documents are independent of each other, the tokens of one are not."""

from collections.abc import Iterable

import numpy as np

FEW_DOCUMENTS = 10
"""Effective number of evaluation documents below which a confidence interval over them means little."""


def effective_documents(tokens: Iterable[int]) -> float:
    """The number of documents of equal length with the same weight: (sum of tokens)^2 / sum of tokens^2."""
    lengths = np.fromiter(tokens, dtype=np.float64)
    return float(lengths.sum() ** 2 / (lengths**2).sum()) if lengths.any() else 0.0


def few_documents_warning(documents: int, effective: float) -> str | None:
    """A sentence if the effective number is below `FEW_DOCUMENTS`, otherwise None."""
    if effective >= FEW_DOCUMENTS:
        return None
    return (
        f"the {documents:,} evaluation documents weigh as much as {effective:.1f} of equal length, so an interval over "
        f"them means little; at least {FEW_DOCUMENTS} are expected, by shorter documents or a larger data.val_fraction."
    )
