"""Prepared data on disk: memory-mapped token shards, a table of documents and a manifest.

A split is a sequence of documents, each its tokens followed by the end token. A document is in one shard.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moelm.errors import MoelmError

FORMAT = 1
"""Version of the files; a part of the hash in the folder's name."""
SHARD_TOKENS = 100_000_000
"""Maximum tokens of a shard, unless a single document is longer."""
DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("domain", "<u2"), ("source", "<u2"), ("hash", "<u8")])
"""One row of a split's document table; `tokens` counts the end token, `bytes` the UTF-8 text."""


class SplitWriter:
    """Writes one split."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.shards: list[dict[str, Any]] = []
        self.documents = self.bytes = 0
        self._table = (folder / f"{split}.documents.bin").open("wb")
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
        self._table.write(np.array((len(ids), size, domain, source, digest), dtype=DOCUMENT).tobytes())
        self.documents += 1
        self.bytes += size

    def close(self) -> dict[str, Any]:
        """Close the files; returns the split's part of the manifest."""
        self._close_shard()
        self._table.close()
        tokens = sum(shard["tokens"] for shard in self.shards)
        return {"shards": self.shards, "documents": self.documents, "tokens": tokens, "bytes": self.bytes}

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
        self.name = split
        self.domains: list[str] = manifest["domains"]
        self.documents: NDArray[Any] = np.fromfile(folder / f"{split}.documents.bin", dtype=DOCUMENT)
        self._shards = [np.memmap(folder / shard["file"], dtype=dtype, mode="r") for shard in split_manifest["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        sizes = [shard["tokens"] for shard in split_manifest["shards"]]
        if [len(shard) for shard in self._shards] != sizes or len(self.documents) != split_manifest["documents"]:
            raise MoelmError(f"{folder} is damaged: the files of {split} are not as long as its manifest says; delete it.")

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
    """The manifest of a finished dataset; None if there is none. It is the last file that is written."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise MoelmError(f"{folder / 'manifest.json'} is damaged; delete {folder} and prepare it again.") from None
    return manifest
