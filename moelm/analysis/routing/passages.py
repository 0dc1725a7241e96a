"""Pieces of the text that was looked at, token by token with the experts of every layer (Mixtral 2024, figure 8)."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moelm.analysis.routing.collect import draw_rows
from moelm.analysis.routing.tokens import cut, read
from moelm.rundir import Opened

LENGTH = 256
"""Tokens of a passage at most; what the model reads in one row may be less."""
OF_DOMAIN = 2


class Passage(NamedTuple):
    """A part of one document."""

    domain: str
    texts: list[str]
    """Of the tokens; together they are the passage."""
    experts: dict[int, list[list[int]]]
    """Those that each token visits when it is read, best first, by the number of the layer."""


def read_passages(run: Opened, tokens: int, seed: int) -> list[Passage]:
    """Two passages of each domain, by lot from the rows that `collect` draws; long ones are likelier."""
    rows, tokenizer = run.rows, run.tokenizer
    packing, table = rows.packing, rows.split.documents
    drawn = draw_rows(rows, tokens, seed)
    fragments = np.concatenate([np.arange(packing.row_starts[row], packing.row_starts[row + 1]) for row in drawn])
    domains = table["domain"][packing.document[fragments]]
    starts = np.cumsum(table["tokens"].astype(np.int64)) - table["tokens"]
    rng = np.random.default_rng(seed)
    found = []
    for number in np.unique(domains):
        there: NDArray[np.int64] = fragments[domains == number]
        weights = np.minimum(packing.length[there], LENGTH)
        for fragment in rng.choice(there, min(OF_DOMAIN, len(there)), replace=False, p=weights / weights.sum()):
            first = starts[packing.document[fragment]] + packing.start[fragment]
            length = min(int(packing.length[fragment]), LENGTH, rows.row_len - 1)  # the start token wants its place
            ids = [token for token in rows.split.take(first + np.arange(length)).tolist() if token != tokenizer.eos_id]
            with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.dtype == torch.bfloat16):
                experts = read(run.model, [tokenizer.bos_id, *ids])
            before = tokenizer.bos_id
            texts = cut(tokenizer, before, ids, tokenizer.decode([before, *ids])[len(tokenizer.decode([before])) :])
            found.append(Passage(rows.split.domains[number], texts, {layer: at[1:] for layer, at in experts.items()}))
    return found
