"""Which documents of the builtin corpus are held out for evaluation: many short excerpts, of every domain in proportion.

An evaluation is as sure as its number of independent documents allows, and costs time by its tokens. So excerpts are held
out instead of whole files; the rest of such a file is left out of the corpus.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moelm.data.document import Document, text_digest

EXCERPT_SHARE = 0.002
"""Largest part of the validation split that an excerpt is, in characters: 500 excerpts or more."""
WHOLE_SHARE = 0.003
"""A document up to this part is held out whole."""
MIN_EXCERPT = 400
"""Characters of an excerpt at least, in a corpus so small that `EXCERPT_SHARE` is less."""
NGRAM = 8
"""Words of the sequences by which near duplicates are found."""
MAX_SHARED = 0.5
"""Part of an excerpt's word sequences that may occur in other documents; beyond it, the excerpt is a near duplicate."""

_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(NGRAM)], dtype=np.uint64)


def hold_out(documents: Sequence[Document], fraction: float, seed: int, generated: str) -> Iterator[Document]:
    """All documents in their order, each with its split; those of the validation split are cut to excerpts.

    The validation split has `fraction` of the characters of each domain. Its documents are chosen by the hash of their
    text. Excerpts that occur in other documents too, such as licenses, are not chosen.

    Args:
        seed: another seed selects other documents.
        generated: prefix of the domains of generated text, which repeats its phrases by design and is not searched for near
            duplicates.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.domain] = sizes.get(document.domain, 0) + len(document.text)
    val_size = fraction * sum(sizes.values())
    excerpt_size = max(MIN_EXCERPT, round(EXCERPT_SHARE * val_size))
    whole_size = max(MIN_EXCERPT, round(WHOLE_SHARE * val_size))
    digests = [text_digest(document.text, seed) for document in documents]
    candidates: dict[str, list[tuple[int, Document]]] = {domain: [] for domain in sizes}
    pooled = dict.fromkeys(sizes, 0)
    for index in sorted(range(len(documents)), key=digests.__getitem__):
        document = documents[index]
        # Twice as many as are needed, for there are near duplicates among them.
        if pooled[document.domain] < 2 * fraction * sizes[document.domain]:
            text, left_out = document.text, document.left_out
            if len(text) > whole_size:
                text = excerpt(text, excerpt_size, digests[index])
                left_out += len(document.text) - len(text)
            candidates[document.domain].append((index, document._replace(text=text, split="val", left_out=left_out)))
            pooled[document.domain] += len(text)
    searched = {index: held_out.text for pool in candidates.values() for index, held_out in pool}
    searched = {index: text for index, text in searched.items() if not documents[index].domain.startswith(generated)}
    repeated = near_duplicates([document.text for document in documents], searched)
    chosen: dict[int, Document] = {}
    for domain, pool in candidates.items():
        wanted = fraction * sizes[domain]
        for index, held_out in pool:
            if wanted >= len(held_out.text) / 2 and index not in repeated:
                chosen[index] = held_out
                wanted -= len(held_out.text)
    for index, document in enumerate(documents):
        yield chosen.get(index) or document._replace(split="train")


def excerpt(text: str, size: int, digest: int) -> str:
    """At most `size` characters, from the start of a line that the digest selects to the end of a line if there is one."""
    start = digest % (len(text) - size + 1)
    line = text.find("\n", max(0, start - 1), start + size // 2) + 1 if start else 0
    start = line or start
    part = text[start : start + size]
    end = part.rfind("\n", size // 2) + 1
    return part[:end] if end and len(part) == size else part


def near_duplicates(texts: Sequence[str], excerpts: dict[int, str]) -> set[int]:
    """The excerpts more than `MAX_SHARED` of whose word sequences occur in other texts than their own.

    Args:
        excerpts: by the index of their text.
    """
    vocabulary: dict[str, int] = {}
    own = {index: _ngrams(text, vocabulary) for index, text in excerpts.items()}
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *own.values()]))
    if not len(wanted):
        return set()
    texts_with = np.zeros(len(wanted), dtype=np.int64)
    for text in texts:
        found = _ngrams(text, vocabulary)
        places = np.searchsorted(wanted, found)
        places[places == len(wanted)] = 0
        texts_with[np.unique(places[wanted[places] == found])] += 1
    found_elsewhere = {index: texts_with[np.searchsorted(wanted, ngrams)] > 1 for index, ngrams in own.items()}
    return {index for index, found in found_elsewhere.items() if len(found) and found.mean() > MAX_SHARED}


def _ngrams(text: str, vocabulary: dict[str, int]) -> NDArray[np.uint64]:
    """The hash of each sequence of `NGRAM` words, whatever the spaces between them; new words are added."""
    number = vocabulary.setdefault
    words = np.array([number(word, len(vocabulary) + 1) for word in text.split()], dtype=np.uint64)
    if len(words) < NGRAM:
        return np.empty(0, dtype=np.uint64)
    hashes: NDArray[np.uint64] = np.lib.stride_tricks.sliding_window_view(words, NGRAM) @ _POWERS
    return hashes
