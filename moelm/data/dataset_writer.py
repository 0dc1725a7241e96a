"""Tokenization of sources into the token shards and document tables of a dataset, in constant memory."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moelm.config import DataConfig, SourceConfig
from moelm.console import ProgressLine, warn
from moelm.data.document import Document
from moelm.data.effective_documents import effective_documents, few_documents_warning
from moelm.data.shards import Account, SplitWriter
from moelm.data.splitting import SplitDocument, Splitter, cut_document
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.formats import byte_size

BATCH_CHARS = 1 << 21
"""Characters that are tokenized at once; enough to use all cores."""
_NAMES_SHOWN = 10
"""Domains that a warning names."""

Encoded = tuple[SplitDocument, list[list[int]]]
"""A document, and the token ids of each of its parts without end tokens."""


class DatasetWriter:
    """Writes the documents of all sources to both splits, and keeps account of them.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path, data: DataConfig, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.accounts: list[Account] = []
        self.domains: dict[str, int] = {}
        """Id of each domain, in the order of appearance."""
        self._held_out: set[str] = set()
        self._seen: set[int] = set()
        self._splits = {split: SplitWriter(folder, split, tokenizer.vocab_size) for split in ("train", "val")}
        self.dtype = self._splits["train"].dtype.str
        self._started = time.monotonic()

    def add_source(self, source: SourceConfig, documents: Iterable[Document], progress_line: ProgressLine) -> None:
        """Write the documents of the next source, up to its limits.

        Raises:
            MoelmError: there are none.
        """
        account = _new_account(source.label)
        self.accounts.append(account)
        splitter = Splitter(documents, self.data, source, self._seen)
        for batch in _encode(splitter, self.tokenizer):
            kept = self._write_batch(batch, source, splitter, account)
            texts = [text for document, _ in kept for text in document.texts]
            losses = self.tokenizer.count_losses(texts, [ids for _, parts in kept for ids in parts])
            account["unknown_tokens"] += losses.unknown_tokens
            account["unknown_characters"] += losses.unknown_characters
            account["lost_characters"] += losses.lost_characters
            progress_line.update(self._progress(source.label))
        if not splitter.stopped:
            account |= {"read": splitter.read, "duplicates": splitter.duplicates, "blank": splitter.blank}
        if splitter.read == splitter.blank:
            raise MoelmError(f"{source.path or source.label} is empty: it contains no text.")
        if splitter.stopped and not account["kept"]:
            raise MoelmError(f"{source.label}: max_tokens = {source.max_tokens} leaves no document; more are expected.")

    def close(self) -> dict[str, dict[str, Any]]:
        """Close the files and print warnings; returns each split's part of the manifest."""
        if unseen := sorted(self.domains.keys() - self._held_out):
            more = f" and {len(unseen) - _NAMES_SHOWN:,} others" if len(unseen) > _NAMES_SHOWN else ""
            warn(
                f"no document of {', '.join(unseen[:_NAMES_SHOWN])}{more} is in the validation split, so it will have no "
                f"validation loss; a larger data.val_fraction than {self.data.val_fraction} would include some."
            )
        lengths = self._splits["val"].lengths
        if warning := few_documents_warning(len(lengths), effective_documents(lengths)):
            warn(warning)
        for account in self.accounts:
            if not account["kept"]:
                warn(f"nothing of {account['label']} is kept, because all of its documents are in sources before it.")
            if account["unknown_characters"] or account["lost_characters"]:
                unknown, lost, total = account["unknown_characters"], account["lost_characters"], account["characters"]
                warn(
                    f"of the {total:,} characters of {account['label']}, {unknown:,} ({unknown / total:.2%}) become "
                    f"unknown tokens and {lost:,} ({lost / total:.2%}) are lost (dropped or changed by the tokenizer); "
                    "bits/byte is not comparable with that of a tokenizer that loses nothing."
                )
        return {split: writer.close() for split, writer in self._splits.items()}

    def _write_batch(
        self, batch: list[Encoded], source: SourceConfig, splitter: Splitter, account: Account
    ) -> list[Encoded]:
        """Write the documents within the limit of the source; returns them."""
        kept: list[Encoded] = []
        for document, ids in batch:
            if splitter.stopped:
                splitter.leave_out(document)
                continue
            encoded: Encoded | None = document, ids
            if source.max_tokens is not None and account["tokens"] + _count_tokens(ids) >= source.max_tokens:
                splitter.stopped = True
                if account["tokens"] + _count_tokens(ids) > source.max_tokens:
                    encoded = cut_document(document, source.max_tokens - account["tokens"], self.tokenizer, self.data)
                    account["cut"] = int(encoded is not None)
            if encoded is None:
                splitter.leave_out(document)
                continue
            self._write(*encoded, account)
            kept.append(encoded)
        return kept

    def _write(self, document: SplitDocument, ids: list[list[int]], account: Account) -> None:
        domain = self.domains.setdefault(document.domain, len(self.domains))
        for part, part_ids in zip(document.parts, ids, strict=True):
            size = len(part.text.encode())
            tokens = [*part_ids, self.tokenizer.eos_id]
            self._splits[part.split].add(tokens, size, domain, len(self.accounts) - 1, document.hash)
            account["tokens"] += len(tokens)
            account["bytes"] += size
            account["characters"] += len(part.text)
            if part.split == "val":
                self._held_out.add(document.domain)
        account["kept"] += 1
        account["left_out_characters"] += document.left_out
        account |= {"read": document.read, "duplicates": document.duplicates, "blank": document.blank}

    def _progress(self, label: str) -> str:
        documents = sum(len(writer.lengths) for writer in self._splits.values())
        size = sum(writer.bytes for writer in self._splits.values())
        rate = size / max(time.monotonic() - self._started, 1e-9)
        return f"Encoding {label}: {documents:,} documents, {byte_size(size)} of text, {byte_size(rate)}/s"


def _new_account(label: str) -> Account:
    return {
        "label": label,
        "read": 0,
        "kept": 0,
        "duplicates": 0,
        "blank": 0,
        "cut": 0,
        "tokens": 0,
        "bytes": 0,
        "characters": 0,
        "left_out_characters": 0,
        "unknown_tokens": 0,
        "unknown_characters": 0,
        "lost_characters": 0,
    }


def _count_tokens(ids: list[list[int]]) -> int:
    """Tokens of a document's parts, each with an end token."""
    return sum(map(len, ids)) + len(ids)


def _encode(documents: Iterable[SplitDocument], tokenizer: Tokenizer) -> Iterator[list[Encoded]]:
    """Token ids of documents in batches; the next batch is read and encoded while the last one is written."""

    def encode(batch: list[SplitDocument]) -> list[Encoded]:
        ids = iter(tokenizer.encode_batch([text for document in batch for text in document.texts]))
        return [(document, [next(ids) for _ in document.parts]) for document in batch]

    pending: Future[list[Encoded]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in _batches(documents):
            done, pending = pending, pool.submit(encode, batch)
            if done is not None:
                yield done.result()
        if pending is not None:
            yield pending.result()


def _batches(documents: Iterable[SplitDocument]) -> Iterator[list[SplitDocument]]:
    batch: list[SplitDocument] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += sum(map(len, document.texts))
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
