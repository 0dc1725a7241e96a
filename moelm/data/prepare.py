"""Preparation of a dataset: documents are deduplicated, split, tokenized and written to a folder, in constant memory.

The folder's name is a hash of the settings and of the state of the sources, so changed sources make a new folder. It is
complete or does not exist.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelm import __version__
from moelm.atomic import atomic_directory
from moelm.config import DataConfig
from moelm.console import ProgressLine, log
from moelm.data.dataset_writer import DatasetWriter
from moelm.data.document import Document
from moelm.data.paths import MissingSource
from moelm.data.shards import (
    FORMAT,
    MAX_DOCUMENT_BYTES,
    check_files,
    content_hash,
    read_manifest,
)
from moelm.data.sources import read_source, source_fingerprint
from moelm.data.splitting import Splitter
from moelm.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_fingerprint
from moelm.errors import MoelmError, first_line
from moelm.formats import byte_size


def prepared_folder(data: DataConfig) -> Path:
    """The folder of this config's dataset, whether it is prepared or not.

    Raises:
        MissingSource: a source does not exist.
    """
    return _folder(data, _recipe(data))


def find_prepared(data: DataConfig, data_sha256: str | None = None) -> Path | None:
    """The folder that was prepared with these settings, whatever the state of the sources is now; None if there is none.

    Args:
        data_sha256: the content that is wanted.

    Raises:
        MoelmError: there are several of different content.
    """
    wanted = _settings(data)
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(Path(data.dir).glob("*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except MoelmError:  # of another dataset, or of no use here
            continue
        if manifest is not None and data_sha256 in (None, manifest["data_sha256"]):
            recipe = {key: manifest["recipe"].get(key) for key in wanted}
            if recipe == wanted:
                found.setdefault((manifest["data_sha256"], manifest["tokenizer_sha256"]), path.parent)
    if len(found) > 1:
        names = ", ".join(map(str, found.values()))
        raise MoelmError(
            f"Several datasets of different content were prepared with these settings: {names}; delete all but one, "
            "or restore the sources."
        )
    return next(iter(found.values()), None)


def prepare(data: DataConfig, verify: bool = False) -> tuple[Path, bool]:
    """Prepare a dataset, unless it is prepared already.

    Where the sources are gone, a dataset that was prepared from them before is used.

    Args:
        verify: compare the files of a dataset that is prepared already with its hashes.

    Returns:
        Its folder, and whether any work was done.

    Raises:
        MoelmError: unusable input, and no folder is created; or a damaged dataset.
    """
    try:
        recipe = _recipe(data)
        folder = _folder(data, recipe)
        worked = read_manifest(folder) is None
        if worked:
            _write_folder(data, recipe, folder)
    except MissingSource as error:
        found = find_prepared(data)
        if found is None:
            raise
        log(f"{error} The data that was prepared before in {found} is used.")
        folder, worked = found, False
    if verify and not worked:
        manifest = read_manifest(folder)
        assert manifest is not None
        check_files(folder, manifest)
    return folder, worked


def _folder(data: DataConfig, recipe: dict[str, Any]) -> Path:
    return Path(data.dir) / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def _settings(data: DataConfig) -> dict[str, Any]:
    """The settings that the prepared tokens depend on; rows, weights and masks are computed from them later."""
    settings = data.model_dump(mode="json", include={"tokenizer", "val_fraction", "holdout", "max_document_mb"})
    if data.split_seed:  # the folder of the usual split has the name that it had before there were others
        settings["split_seed"] = data.split_seed
    settings["format"] = FORMAT
    settings["sources"] = [source.model_dump(mode="json", exclude={"weight"}) for source in data.sources]
    return settings


def _recipe(data: DataConfig) -> dict[str, Any]:
    """Everything that the prepared tokens depend on: the settings, and the state of the files that they name."""
    recipe = _settings(data)
    recipe["inputs"] = [source_fingerprint(source) for source in data.sources]
    if data.tokenizer.path is not None:
        if not Path(data.tokenizer.path).exists():
            raise MissingSource(f"There is no tokenizer file {data.tokenizer.path}.")
        recipe["tokenizer_sha256"] = tokenizer_fingerprint(Path(data.tokenizer.path))
    return recipe


def _write_folder(data: DataConfig, recipe: dict[str, Any], folder: Path) -> None:
    try:
        with atomic_directory(folder) as work:
            manifest = _write_dataset(data, work)
            _check_unchanged(data, recipe)
            manifest["recipe"] = recipe
            (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        if read_manifest(folder) is None:  # otherwise another process has prepared the same content
            reason = first_line(error.strerror or error)
            reason = reason[0].lower() + reason[1:]
            raise MoelmError(f"The data cannot be written under {folder.parent}: {reason}.") from error


def _check_unchanged(data: DataConfig, recipe: dict[str, Any]) -> None:
    """Refuse sources that have another state than at the start, and may have been read in part before they changed."""
    now = _recipe(data)
    for source, before, after in zip(data.sources, recipe["inputs"], now["inputs"], strict=True):
        if before != after:
            raise MoelmError(f"{source.label} has changed while it was read; prepare it again when it is complete.")
    if now != recipe:
        raise MoelmError(f"{data.tokenizer.path} has changed while it was used; prepare the data again.")


def _write_dataset(data: DataConfig, work: Path) -> dict[str, Any]:
    """Write tokenizer, token shards and document tables to an empty folder; returns the manifest without the recipe."""
    with ProgressLine("Reading documents …") as progress_line:
        max_bytes = int(min(data.max_document_mb * 1e6, MAX_DOCUMENT_BYTES))
        fraction = data.val_fraction if data.holdout == "documents" else None
        streams = [read_source(source, max_bytes, fraction, data.split_seed) for source in data.sources]
        tokenizer, streams = _train_tokenizer(data, streams, progress_line)
        tokenizer.save(work / "tokenizer.json")
        writer = DatasetWriter(work, data, tokenizer)
        for source, stream in zip(data.sources, streams, strict=True):
            writer.add_source(source, stream, progress_line)
    splits = writer.close()
    domains = list(writer.domains)
    return {
        "format": FORMAT,
        "moelm": __version__,
        "dtype": writer.dtype,
        "vocab_size": tokenizer.vocab_size,
        "domains": domains,
        "duplicates": sum(account["duplicates"] for account in writer.accounts),
        "sources": writer.accounts,
        "splits": splits,
        "data_sha256": content_hash(splits.values(), domains),
        "eval_sha256": content_hash([splits["val"]], domains),
        "tokenizer_sha256": tokenizer_fingerprint(work / "tokenizer.json"),
    }


def _train_tokenizer(
    data: DataConfig, streams: list[Iterator[Document]], progress_line: ProgressLine
) -> tuple[Tokenizer, list[Iterator[Document]]]:
    """Train the tokenizer on the training split of the first documents of every source.

    Returns:
        The tokenizer, and streams that begin with the documents already read.
    """
    if data.tokenizer.kind in ("byte", "file"):
        return build_tokenizer(data.tokenizer, ()), streams
    share = data.tokenizer.train_bytes // len(streams)
    seen: set[int] = set()
    texts: list[str] = []
    heads: list[list[Document]] = []
    for source, stream in zip(data.sources, streams, strict=True):
        head: list[Document] = []
        for document in Splitter(_record(stream, head, share, progress_line), data, source, seen):
            texts += [part.text for part in document.parts if part.split == "train"]
        heads.append(head)
    progress_line.update("Training the tokenizer …")
    tokenizer = build_tokenizer(data.tokenizer, texts)
    return tokenizer, [itertools.chain(_drain(head), stream) for head, stream in zip(heads, streams, strict=True)]


def _record(
    stream: Iterator[Document], head: list[Document], max_bytes: int, progress_line: ProgressLine
) -> Iterator[Document]:
    """Yield documents up to a total size, and keep them in `head`."""
    size = 0
    for document in stream:
        head.append(document)
        size += len(document.text.encode())
        yield document
        if size >= max_bytes:
            return
        if len(head) % 64 == 0:
            progress_line.update(f"Reading documents for the tokenizer: {byte_size(size)}")


def _drain(documents: list[Document]) -> Iterator[Document]:
    """Yield items and free them."""
    documents.reverse()
    while documents:
        yield documents.pop()
