"""What is kept of a source's documents: deduplication, the two splits, and the limits of the source."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moelm.config import DataConfig, SourceConfig
from moelm.data.document import Document, text_digest
from moelm.data.tokenizer import Tokenizer


class Part(NamedTuple):
    """The text of a document that belongs to one split."""

    text: str
    split: str


class SplitDocument(NamedTuple):
    """A document that is neither blank nor a duplicate, and how many the source had up to it."""

    parts: tuple[Part, ...]
    domain: str
    hash: int
    read: int
    duplicates: int
    blank: int
    left_out: int
    """Characters of it that the source has left out."""

    @property
    def texts(self) -> list[str]:
        """The text of each part."""
        return [part.text for part in self.parts]


class Splitter:
    """The documents of one source without blanks and exact duplicates, each in its split.

    A split is chosen by the hash of the text, independently of other documents, unless the source has chosen it.

    Args:
        seen: hashes of the documents of all sources so far; those of this source are added.
    """

    def __init__(self, documents: Iterable[Document], data: DataConfig, source: SourceConfig, seen: set[int]) -> None:
        self.data, self.source = data, source
        self.read = self.duplicates = self.blank = 0
        self.stopped = False
        """Set to read no further document."""
        self._documents, self._seen = documents, seen

    def __iter__(self) -> Iterator[SplitDocument]:
        kept = 0
        for document in self._documents:
            if self.stopped:
                return
            self.read += 1
            if not document.text or document.text.isspace():
                self.blank += 1
                continue
            digest = text_digest(document.text)
            if digest in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(digest)
            kept += 1
            own = document.split
            parts = split_text(document.text, self.data) if own is None else (Part(document.text, own),)
            counts = self.read, self.duplicates, self.blank, document.left_out
            yield SplitDocument(parts, document.domain, digest, *counts)
            if kept == self.source.max_documents:
                return

    def leave_out(self, document: SplitDocument) -> None:
        """Stop reading, and forget a document that was read ahead of the limit, so that another source may have it."""
        self.stopped = True
        self._seen.discard(document.hash)


def split_text(text: str, data: DataConfig) -> tuple[Part, ...]:
    """The parts of a text in the training and the validation split; its hash decides where it is not divided."""
    if data.holdout == "documents":
        digest = text_digest(text, data.split_seed)
        return (Part(text, "val" if digest < int(data.val_fraction * 2**64) else "train"),)
    boundary = round(len(text) * (1 - data.val_fraction))
    return tuple(part for part in (Part(text[:boundary], "train"), Part(text[boundary:], "val")) if part.text)


def cut_document(
    document: SplitDocument, limit: int, tokenizer: Tokenizer, data: DataConfig
) -> tuple[SplitDocument, list[list[int]]] | None:
    """The longest start of a document that has at most `limit` tokens, end tokens included; None if that is blank.

    The start ends between two characters, and is divided like a whole document.

    Returns:
        The document, and the token ids of each of its parts without end tokens.
    """
    text = "".join(document.texts)
    starts = [start for start, _ in tokenizer.raw.encode(text, add_special_tokens=False).offsets]
    budget = limit - len(document.parts)
    while budget > 0:
        cut = text[: starts[budget]] if budget < len(starts) else text
        if not cut or cut.isspace():
            return None
        parts = split_text(cut, data) if len(document.parts) > 1 else (document.parts[0]._replace(text=cut),)
        ids = tokenizer.encode_batch([part.text for part in parts])
        excess = sum(map(len, ids)) + len(ids) - limit
        if excess <= 0:
            return document._replace(parts=parts), ids
        budget -= excess
    return None
