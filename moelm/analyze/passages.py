"""Passages of the sampled text, token by token with their experts in every sparse layer (Mixtral 2024, figure 8)."""

from typing import NamedTuple

import numpy as np

from moelm.analyze.collect import fragments_of, sample_rows
from moelm.analyze.token_experts import experts_by_layer, token_texts
from moelm.data.tokenizer import Tokenizer
from moelm.inference.continuation import CONTEXT_TOKENS, INCOMPLETE, ContextDecoder
from moelm.model.forward import autocast
from moelm.runs.load import OpenedRun

MAX_TOKENS = 256
"""Tokens in a passage, unless the rows of the data are shorter."""
PER_DOMAIN = 2
UTF8_BYTES = 4
"""Maximum bytes, and so byte tokens, of a character."""


class Passage(NamedTuple):
    """A part of one document."""

    domain: str
    texts: list[str]
    """Text of each token; together they are the passage."""
    experts: dict[int, list[list[int]]]
    """Experts of each token, best first, by the index of the layer."""


def sample_passages(run: OpenedRun, tokens: int, seed: int) -> list[Passage]:
    """Two random passages of each domain, from the rows that `sample_rows` returns; longer ones are more likely."""
    rows, tokenizer = run.rows, run.tokenizer
    packing, documents = rows.packing, rows.split.documents
    fragments = fragments_of(rows, sample_rows(rows, tokens, seed))
    domains = documents["domain"][packing.document[fragments]]
    starts = np.cumsum(documents["tokens"].astype(np.int64)) - documents["tokens"]
    rng = np.random.default_rng(seed)
    passages = []
    for domain in np.unique(domains):
        candidates = fragments[domains == domain]
        weights = np.minimum(packing.length[candidates], MAX_TOKENS)
        size = min(PER_DOMAIN, len(candidates))
        for fragment in rng.choice(candidates, size, replace=False, p=weights / weights.sum()):
            first = starts[packing.document[fragment]] + packing.start[fragment]
            length = min(int(packing.length[fragment]), MAX_TOKENS, rows.row_len - 1)  # one position is the start token
            ids = [token for token in rows.split.take(first + np.arange(length)).tolist() if token != tokenizer.eos_id]
            before_len = min(int(packing.start[fragment]), 2 * CONTEXT_TOKENS)
            before = rows.split.take(first - before_len + np.arange(before_len)).tolist()
            ids, text = _whole_characters(tokenizer, before, ids)
            with autocast(run.device, run.dtype):
                experts = experts_by_layer(run.model, [tokenizer.bos_id, *ids])
            texts = token_texts(tokenizer, before, ids, text)
            without_bos = {layer: experts_TK[1:] for layer, experts_TK in experts.items()}
            passages.append(Passage(rows.split.domains[domain], texts, without_bos))
    return passages


def _whole_characters(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> tuple[list[int], str]:
    """The tokens and their text, without those at the end that are a part of a character."""
    decoder = ContextDecoder(tokenizer, before)
    length, text = len(ids), None
    for number, token in enumerate(ids, 1):
        decoder.add(token)
        if number > len(ids) - UTF8_BYTES and not decoder.text.endswith(INCOMPLETE):
            length, text = number, decoder.text
    return ids[:length], decoder.text if text is None else text
