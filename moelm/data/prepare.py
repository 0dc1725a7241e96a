"""`prepare`: documents in, a versioned folder of tokens out. Idempotent, constant in memory, all or nothing.

The folder's name is a hash of the recipe and of the state of the inputs, so changed input makes a new version; work
happens under a temporary name, and only a finished folder gets the real one.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moelm import __version__
from moelm.config import DataConfig
from moelm.console import ProgressLine, log
from moelm.formats import quantity
from moelm.data.document import Document
from moelm.data.sources import read_source, source_fingerprint
from moelm.data.shards import FORMAT, SplitWriter, read_manifest
from moelm.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_content
from moelm.errors import MoelmError
from moelm.atomic import atomic_directory

BATCH_CHARS = 1 << 21
"""Text handed to the tokenizer at once: enough to keep all cores busy, little enough to forget."""


class Piece(NamedTuple):
    """A document, or the part of one, that belongs to one side of the split."""

    text: str
    domain: str
    split: str
    hash: int
    size: int
    """UTF-8 bytes."""


def prepared_folder(data: DataConfig) -> Path:
    """Where the data set of this config is, or will be once prepared."""
    recipe = json.dumps(_recipe(data), sort_keys=True)
    return Path(data.dir) / hashlib.sha256(recipe.encode()).hexdigest()[:12]


def prepare(data: DataConfig) -> tuple[Path, bool]:
    """Prepare a data set unless it is there already.

    Returns:
        Its folder, and whether any work was done.

    Raises:
        MoelmError: unusable input; nothing is left behind.
    """
    folder = prepared_folder(data)
    if read_manifest(folder) is not None:
        return folder, False
    try:
        with atomic_directory(folder) as work:
            _write(data, work)
    except OSError as error:
        if read_manifest(folder) is None:  # else another process was faster; the content is the same
            raise MoelmError(f"The data cannot be written under {folder.parent}: {error.strerror}.") from error
    return folder, True


def _recipe(data: DataConfig) -> dict[str, Any]:
    """Everything that the prepared tokens depend on; rows, weights and masks are made from them later."""
    recipe = data.model_dump(mode="json", include={"tokenizer", "val_fraction", "holdout", "max_document_mb"})
    recipe["format"] = FORMAT
    recipe["sources"] = [source.model_dump(mode="json", exclude={"weight"}) for source in data.sources]
    recipe["inputs"] = [source_fingerprint(source) for source in data.sources]
    if data.tokenizer.path is not None:
        recipe["tokenizer_content"] = tokenizer_content(Path(data.tokenizer.path))
    return recipe


def _write(data: DataConfig, work: Path) -> None:
    seen: set[int] = set()
    duplicates = [0]
    with ProgressLine("Reading documents …") as progress_line:
        streams = [
            _pieces(read_source(source, int(data.max_document_mb * 1e6)), data, seen, duplicates) for source in data.sources
        ]
        tokenizer, streams = _train_tokenizer(data, streams, progress_line)
        tokenizer.save(work / "tokenizer.json")
        domains: dict[str, int] = {}
        held_out: set[str] = set()
        writers = {split: SplitWriter(work, split, tokenizer.vocab_size) for split in ("train", "val")}
        started = time.monotonic()
        for number, (source, stream) in enumerate(zip(data.sources, streams, strict=True)):
            tokens = 0
            for piece, ids in _encoded(stream, tokenizer):
                tokens += len(ids)
                if source.max_tokens is not None and tokens > source.max_tokens:
                    break
                domain = domains.setdefault(piece.domain, len(domains))
                writers[piece.split].add(ids, piece.size, domain, number, piece.hash)
                if piece.split == "val":
                    held_out.add(piece.domain)
                if writers[piece.split].documents % 64 == 0:
                    progress_line.update(_progress(source.label, writers, started))
        if unseen := sorted(domains.keys() - held_out):
            log(
                f"Warning: no document of {', '.join(unseen)} fell into validation, so its loss will not be told; "
                f"a larger data.val_fraction than {data.val_fraction} would include some."
            )
    splits = {split: writer.close() for split, writer in writers.items()}
    content = [shard["sha256"] for split in splits.values() for shard in split["shards"]]
    manifest = {
        "format": FORMAT,
        "moelm": __version__,
        "recipe": _recipe(data),
        "dtype": writers["train"].dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "domains": list(domains),
        "duplicates": duplicates[0],
        "splits": splits,
        "data_sha256": hashlib.sha256(" ".join(content).encode()).hexdigest()[:16],
        "tokenizer_sha256": hashlib.sha256(tokenizer_content(work / "tokenizer.json").encode()).hexdigest()[:16],
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _pieces(documents: Iterable[Document], data: DataConfig, seen: set[int], duplicates: list[int]) -> Iterator[Piece]:
    """Drop exact duplicates and choose sides, by the hash of the text alone: the rest of the data has no say in it."""
    threshold = int(data.val_fraction * 2**64)
    for document in documents:
        text, digest, size = document.text, *_digest(document.text)
        if digest in seen:
            duplicates[0] += 1
            continue
        seen.add(digest)
        if data.holdout == "documents":
            yield Piece(text, document.domain, "val" if digest < threshold else "train", digest, size)
            continue
        cut = round(len(text) * (1 - data.val_fraction))
        for part, split in ((text[:cut], "train"), (text[cut:], "val")):
            if part:
                yield Piece(part, document.domain, split, digest, len(part.encode()))


def _digest(text: str) -> tuple[int, int]:
    raw = text.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big"), len(raw)


def _train_tokenizer(
    data: DataConfig, streams: list[Iterator[Piece]], progress_line: ProgressLine
) -> tuple[Tokenizer, list[Iterator[Piece]]]:
    """Train on the opening of every source and give it back: documents are read, and generated, once."""
    if data.tokenizer.kind in ("byte", "file"):
        return build_tokenizer(data.tokenizer, ()), streams
    share = data.tokenizer.train_bytes // len(streams)
    heads: list[list[Piece]] = []
    for stream in streams:
        head: list[Piece] = []
        size = 0
        for piece in stream:
            head.append(piece)
            size += piece.size
            if size >= share:
                break
            if len(head) % 64 == 0:
                progress_line.update(f"Reading documents for the tokenizer: {quantity(size)}B")
        heads.append(head)
    progress_line.update("Training the tokenizer …")
    texts = (piece.text for head in heads for piece in head if piece.split == "train")
    tokenizer = build_tokenizer(data.tokenizer, texts)
    return tokenizer, [itertools.chain(_drain(head), stream) for head, stream in zip(heads, streams, strict=True)]


def _drain(pieces: list[Piece]) -> Iterator[Piece]:
    """Yield and forget."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


def _encoded(pieces: Iterator[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
    """Token ids of each piece, the end token included; the next batch is read and encoded while the last is written."""

    def encode(batch: list[Piece]) -> list[tuple[Piece, list[int]]]:
        every = tokenizer.encode_batch([piece.text for piece in batch])
        return [(piece, [*ids, tokenizer.eos_id]) for piece, ids in zip(batch, every, strict=True)]

    waiting: Future[list[tuple[Piece, list[int]]]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in _batches(pieces):
            done, waiting = waiting, pool.submit(encode, batch)
            if done is not None:
                yield from done.result()
        if waiting is not None:
            yield from waiting.result()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _progress(label: str, writers: dict[str, SplitWriter], started: float) -> str:
    documents = sum(writer.documents for writer in writers.values())
    size = sum(writer.bytes for writer in writers.values())
    rate = size / max(time.monotonic() - started, 1e-9)
    return f"Encoding {label}: {documents:,} documents, {quantity(size)}B of text, {quantity(rate)}B/s"
