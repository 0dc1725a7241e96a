"""Prepared data on disk: memory-mapped token shards, a table of documents and a manifest.

A split is a sequence of documents, each its tokens followed by the end token. A document is in one shard.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from moelm.data.tokenizer import tokenizer_fingerprint
from moelm.errors import MoelmError

FORMAT = 2
"""Version of the files; a part of the hash in the folder's name."""
SHARD_TOKENS = 100_000_000
"""Maximum tokens of a shard, unless a single document is longer."""
DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("domain", "<u4"), ("source", "<u4"), ("hash", "<u8")])
"""One row of a split's document table; `tokens` counts the end token, `bytes` the UTF-8 text."""
MAX_DOCUMENT_BYTES = (1 << 32) - 2
"""Largest document that a row of the table describes; it has at most one token a byte, and the end token."""

_Size = Annotated[int, Field(ge=0, lt=1 << 63)]
_FileName = Annotated[str, Field(pattern=r"^[a-z]+-\d+\.bin$")]


class _Shard(TypedDict):
    file: _FileName
    tokens: _Size
    sha256: str


class _SplitFiles(TypedDict):
    shards: list[_Shard]
    documents: _Size
    tokens: _Size
    bytes: _Size
    documents_sha256: str


class _Splits(TypedDict):
    train: _SplitFiles
    val: _SplitFiles


class Account(TypedDict):
    """What became of the documents of one source; read = kept + duplicates + blank."""

    label: str
    read: _Size
    kept: _Size
    duplicates: _Size
    blank: _Size
    cut: _Size
    """Kept documents of which only the start fits into `max_tokens`."""
    tokens: _Size
    """Of the kept documents, end tokens included."""
    bytes: _Size
    characters: _Size
    left_out_characters: NotRequired[_Size]
    """Characters of kept documents that the builtin corpus leaves out; absent in data of earlier versions."""
    unknown_tokens: _Size
    unknown_characters: _Size
    """Characters that have become unknown tokens."""
    lost_characters: _Size
    """Characters that the tokenizer drops or changes."""


class _Recipe(TypedDict):
    sources: list[dict[str, Any]]
    inputs: list[Any]


class _Manifest(TypedDict):
    moelm: str
    recipe: _Recipe
    dtype: Literal["<u2", "<u4"]
    vocab_size: Annotated[int, Field(gt=0, lt=1 << 32)]
    domains: list[str]
    duplicates: _Size
    sources: list[Account]
    splits: _Splits
    data_sha256: str
    eval_sha256: str
    tokenizer_sha256: str


_MANIFEST = TypeAdapter(_Manifest)


class SplitWriter:
    """Writes one split."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.shards: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        """Tokens of each document."""
        self.bytes = 0
        self._table = (folder / _table_name(split)).open("wb")
        self._table_digest = hashlib.sha256()
        self._shard: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def add(self, ids: Sequence[int], size: int, domain: int, source: int, digest: int) -> None:
        """Append one document: its tokens (with the end token), UTF-8 size, domain, source and content hash."""
        if self._shard is None or self.shards[-1]["tokens"] + len(ids) > self.shard_tokens:
            self._open_next_shard()
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        assert self._shard is not None
        self._shard.write(data)
        self._digest.update(data)
        self.shards[-1]["tokens"] += len(ids)
        row = np.array((len(ids), size, domain, source, digest), dtype=DOCUMENT).tobytes()
        self._table.write(row)
        self._table_digest.update(row)
        self.lengths.append(len(ids))
        self.bytes += size

    def close(self) -> dict[str, Any]:
        """Close the files; returns the split's part of the manifest."""
        self._close_shard()
        self._table.close()
        counts = {"documents": len(self.lengths), "tokens": sum(self.lengths), "bytes": self.bytes}
        return {"shards": self.shards, **counts, "documents_sha256": self._table_digest.hexdigest()}

    def _open_next_shard(self) -> None:
        self._close_shard()
        name = f"{self.split}-{len(self.shards):05}.bin"
        self.shards.append({"file": name, "tokens": 0, "sha256": ""})
        self._shard = (self.folder / name).open("wb")

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self.shards[-1]["sha256"] = self._digest.hexdigest()
        self._digest = hashlib.sha256()


class Split:
    """One split, memory-mapped."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        split_manifest = manifest["splits"][split]
        dtype = np.dtype(manifest["dtype"])
        self.folder, self.name = folder, split
        self.documents_sha256: str = split_manifest["documents_sha256"]
        self.domains: list[str] = manifest["domains"]
        table = folder / _table_name(split)
        shards = {folder / shard["file"]: shard["tokens"] * dtype.itemsize for shard in split_manifest["shards"]}
        sizes = {table: split_manifest["documents"] * DOCUMENT.itemsize, **shards}
        for path, size in sizes.items():
            if not path.is_file() or path.stat().st_size != size:
                raise _damaged(folder, f"{path.name} is not as long as the manifest says")
        self.documents: NDArray[Any] = np.fromfile(table, dtype=DOCUMENT)
        if int(self.documents["tokens"].sum(dtype=np.uint64)) != sum(shards.values()) // dtype.itemsize or any(
            self.documents["domain"] >= len(self.domains)
        ):
            raise _damaged(folder, f"{table.name} does not agree with the manifest")
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def take(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids at these offsets in the split."""
        if len(self._shards) == 1:
            return self._shards[0][offsets].astype(np.int64)
        ids = np.empty(len(offsets), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, offsets, side="right")
        for number in np.unique(shard_of):
            selected = shard_of == number
            first = self._ends[number] - len(self._shards[number])
            ids[selected] = self._shards[number][offsets[selected] - first]
        return ids


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished dataset; None if there is none. It is the last file that is written.

    Raises:
        MoelmError: it is damaged, or of another version of moelm.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
            raise MoelmError(f"{folder} was prepared by another version of moelm; delete it and prepare the data again.")
        _MANIFEST.validate_python(manifest, strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _damaged(folder, f"{where or 'the content'} of manifest.json is not valid") from None
    except (ValueError, RecursionError):
        raise _damaged(folder, "manifest.json is not valid JSON") from None
    return manifest


def content_hash(splits: Iterable[dict[str, Any]], domains: list[str]) -> str:
    """The hash of the tokens and document tables of splits, and of the names of their domains."""
    parts = [[split["documents_sha256"], *(shard["sha256"] for shard in split["shards"])] for split in splits]
    return hashlib.sha256(json.dumps([parts, domains]).encode()).hexdigest()[:16]


def check_files(folder: Path, manifest: dict[str, Any], shards_of: Sequence[str] = ("train", "val")) -> None:
    """Compare token shards, document tables and the tokenizer with the hashes of a manifest.

    Args:
        shards_of: the splits whose shards are read.

    Raises:
        MoelmError: a file is missing or differs.
    """
    for split, files in manifest["splits"].items():
        expected = {shard["file"]: shard["sha256"] for shard in files["shards"] if split in shards_of}
        for name, digest in {**expected, _table_name(split): files["documents_sha256"]}.items():
            try:
                with (folder / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _damaged(folder, f"{name} cannot be read: {error.strerror}") from None
            if found != digest:
                raise _damaged(folder, f"{name} is not as it was written")
    splits = manifest["splits"]
    if manifest["data_sha256"] != content_hash(splits.values(), manifest["domains"]) or manifest[
        "eval_sha256"
    ] != content_hash([splits["val"]], manifest["domains"]):
        raise _damaged(folder, "the hashes in manifest.json do not agree with each other")
    if tokenizer_fingerprint(folder / "tokenizer.json") != manifest["tokenizer_sha256"]:
        raise _damaged(folder, "tokenizer.json is not as it was written")


def _damaged(folder: Path, reason: str) -> MoelmError:
    """The error for prepared data that are not as they were written."""
    return MoelmError(f"{folder} is damaged: {reason}; delete {folder} and prepare the data again.")


def _table_name(split: str) -> str:
    return f"{split}.documents.bin"
