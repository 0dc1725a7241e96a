"""Preparation of a dataset: documents are deduplicated, split, tokenized and written to a folder, in constant memory.

The folder's name is a hash of the settings and of the state of the sources, so changed sources make a new folder. It is
complete or does not exist.
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
from moelm.atomic import atomic_directory
from moelm.config import DataConfig
from moelm.console import ProgressLine, warn
from moelm.data.document import Document
from moelm.data.shards import FORMAT, SplitWriter, read_manifest
from moelm.data.sources import read_source, source_fingerprint
from moelm.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_content
from moelm.errors import MoelmError
from moelm.formats import byte_size

BATCH_CHARS = 1 << 21
"""Characters that are tokenized at once; enough to use all cores."""


class SplitText(NamedTuple):
    """A document, or the part of one that belongs to a split."""

    text: str
    domain: str
    split: str
    hash: int
    size: int
    """UTF-8 bytes."""


def prepared_folder(data: DataConfig) -> Path:
    """The folder of this config's dataset, whether it is prepared or not."""
    recipe = json.dumps(_recipe(data), sort_keys=True)
    return Path(data.dir) / hashlib.sha256(recipe.encode()).hexdigest()[:12]


def prepare(data: DataConfig) -> tuple[Path, bool]:
    """Prepare a dataset, unless it is prepared already.

    Returns:
        Its folder, and whether any work was done.

    Raises:
        MoelmError: unusable input; no folder is created.
    """
    folder = prepared_folder(data)
    if read_manifest(folder) is not None:
        return folder, False
    try:
        with atomic_directory(folder) as work:
            _write_dataset(data, work)
    except OSError as error:
        if read_manifest(folder) is None:  # otherwise another process has prepared the same content
            raise MoelmError(f"The data cannot be written under {folder.parent}: {error.strerror}.") from error
    return folder, True


def _recipe(data: DataConfig) -> dict[str, Any]:
    """Everything that the prepared tokens depend on; rows, weights and masks are computed from them later."""
    recipe = data.model_dump(mode="json", include={"tokenizer", "val_fraction", "holdout", "max_document_mb"})
    recipe["format"] = FORMAT
    recipe["sources"] = [source.model_dump(mode="json", exclude={"weight"}) for source in data.sources]
    recipe["inputs"] = [source_fingerprint(source) for source in data.sources]
    if data.tokenizer.path is not None:
        recipe["tokenizer_content"] = tokenizer_content(Path(data.tokenizer.path))
    return recipe


def _write_dataset(data: DataConfig, work: Path) -> None:
    """Write the files of a dataset to an empty folder; the manifest is the last one."""
    seen: set[int] = set()
    duplicates = [0]
    with ProgressLine("Reading documents …") as progress_line:
        max_bytes = int(data.max_document_mb * 1e6)
        streams = [_split_texts(read_source(source, max_bytes), data, seen, duplicates) for source in data.sources]
        tokenizer, streams = _train_tokenizer(data, streams, progress_line)
        tokenizer.save(work / "tokenizer.json")
        domains: dict[str, int] = {}
        held_out: set[str] = set()
        writers = {split: SplitWriter(work, split, tokenizer.vocab_size) for split in ("train", "val")}
        started = time.monotonic()
        for source_index, (source, stream) in enumerate(zip(data.sources, streams, strict=True)):
            tokens = 0
            for part, ids in _encode(stream, tokenizer):
                tokens += len(ids)
                if source.max_tokens is not None and tokens > source.max_tokens:
                    break
                domain = domains.setdefault(part.domain, len(domains))
                writers[part.split].add(ids, part.size, domain, source_index, part.hash)
                if part.split == "val":
                    held_out.add(part.domain)
                if writers[part.split].documents % 64 == 0:
                    progress_line.update(_progress_message(source.label, writers, started))
        if unseen := sorted(domains.keys() - held_out):
            warn(
                f"no document of {', '.join(unseen)} is in the validation split, so it will have no validation loss; "
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


def _split_texts(
    documents: Iterable[Document], data: DataConfig, seen: set[int], duplicates: list[int]
) -> Iterator[SplitText]:
    """Skip exact duplicates and assign splits by the hash of the text, independently of other documents."""
    threshold = int(data.val_fraction * 2**64)
    for document in documents:
        text, digest, size = document.text, *_digest(document.text)
        if digest in seen:
            duplicates[0] += 1
            continue
        seen.add(digest)
        if data.holdout == "documents":
            yield SplitText(text, document.domain, "val" if digest < threshold else "train", digest, size)
            continue
        boundary = round(len(text) * (1 - data.val_fraction))
        for part, split in ((text[:boundary], "train"), (text[boundary:], "val")):
            if part:
                yield SplitText(part, document.domain, split, digest, len(part.encode()))


def _digest(text: str) -> tuple[int, int]:
    """A 64-bit hash of a text, and its UTF-8 bytes."""
    raw = text.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big"), len(raw)


def _train_tokenizer(
    data: DataConfig, streams: list[Iterator[SplitText]], progress_line: ProgressLine
) -> tuple[Tokenizer, list[Iterator[SplitText]]]:
    """Train the tokenizer on the first documents of every source.

    Returns:
        The tokenizer, and streams that begin with the documents already read.
    """
    if data.tokenizer.kind in ("byte", "file"):
        return build_tokenizer(data.tokenizer, ()), streams
    share = data.tokenizer.train_bytes // len(streams)
    heads: list[list[SplitText]] = []
    for stream in streams:
        head: list[SplitText] = []
        size = 0
        for part in stream:
            head.append(part)
            size += part.size
            if size >= share:
                break
            if len(head) % 64 == 0:
                progress_line.update(f"Reading documents for the tokenizer: {byte_size(size)}")
        heads.append(head)
    progress_line.update("Training the tokenizer …")
    texts = (part.text for head in heads for part in head if part.split == "train")
    tokenizer = build_tokenizer(data.tokenizer, texts)
    return tokenizer, [itertools.chain(_drain(head), stream) for head, stream in zip(heads, streams, strict=True)]


def _drain(parts: list[SplitText]) -> Iterator[SplitText]:
    """Yield items and free them."""
    parts.reverse()
    while parts:
        yield parts.pop()


def _encode(parts: Iterator[SplitText], tokenizer: Tokenizer) -> Iterator[tuple[SplitText, list[int]]]:
    """Token ids of each text with the end token; the next batch is read and encoded while the last one is written."""

    def encode(batch: list[SplitText]) -> list[tuple[SplitText, list[int]]]:
        batch_ids = tokenizer.encode_batch([part.text for part in batch])
        return [(part, [*ids, tokenizer.eos_id]) for part, ids in zip(batch, batch_ids, strict=True)]

    pending: Future[list[tuple[SplitText, list[int]]]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in _batches(parts):
            done, pending = pending, pool.submit(encode, batch)
            if done is not None:
                yield from done.result()
        if pending is not None:
            yield from pending.result()


def _batches(parts: Iterator[SplitText]) -> Iterator[list[SplitText]]:
    batch: list[SplitText] = []
    chars = 0
    for part in parts:
        batch.append(part)
        chars += len(part.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _progress_message(label: str, writers: dict[str, SplitWriter], started: float) -> str:
    documents = sum(writer.documents for writer in writers.values())
    size = sum(writer.bytes for writer in writers.values())
    rate = size / max(time.monotonic() - started, 1e-9)
    return f"Encoding {label}: {documents:,} documents, {byte_size(size)} of text, {byte_size(rate)}/s"
