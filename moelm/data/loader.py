"""Packed rows and batches, as pure functions of (seed, step); the loader has no state to save.

Shapes: B rows, T positions.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moelm.config import RunConfig
from moelm.data.identity import DataRecord
from moelm.data.packing import PACKING_VERSION, Ints, Packing, pack, saved_packing
from moelm.data.shards import Split, check_files, read_manifest
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError

IGNORE = -100
"""Target of a padding position, which has no loss."""
MIN_SAVED_DOCUMENTS = 100_000
"""Documents from which a packing is saved; that of fewer takes less than 0.2 s."""


class Batch(NamedTuple):
    """Rows of document fragments. Each fragment starts with the start token; every token of the data is a target once."""

    tokens_BT: Tensor
    targets_BT: Tensor
    fragments_BT: Tensor
    """Index of each position's fragment in the split's packing; -1 is padding."""

    @property
    def valid_BT(self) -> Tensor:
        """False for padding."""
        return self.targets_BT != IGNORE

    @property
    def valid_N(self) -> Tensor:
        """`valid_BT`, flattened."""
        return self.valid_BT.flatten()

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Rows:
    """The packed rows of one split."""

    def __init__(self, split: Split, row_len: int, tokenizer: Tokenizer, weights: list[float | None]) -> None:
        self.split, self.row_len, self.tokenizer = split, row_len, tokenizer
        self.packing = _packing(split, row_len, weights)
        lengths = split.documents["tokens"].astype(np.int64)
        self._document_starts: Ints = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return self.packing.num_rows

    def count_tokens(self, rows: Ints) -> int:
        """Valid tokens of these rows, without reading them."""
        fragments, _ = self._fragments(rows)
        return int(self.packing.length[fragments].sum())

    def batch(self, rows: Ints) -> Batch:
        """These rows as one batch."""
        fragments, row_of_fragment = self._fragments(rows)
        lengths = self.packing.length[fragments]
        first = self._document_starts[self.packing.document[fragments]] + self.packing.start[fragments]
        offsets, fragment_of_token = _concatenate_ranges(first, lengths)
        before = np.cumsum(lengths) - lengths
        row_starts = before[np.searchsorted(row_of_fragment, np.arange(len(rows)))]
        row_of_token = row_of_fragment[fragment_of_token]
        columns = np.arange(len(offsets)) - row_starts[row_of_token]
        shape = (len(rows), self.row_len)
        tokens = np.full(shape, self.tokenizer.eos_id, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        fragment_ids = np.full(shape, -1, dtype=np.int64)
        ids = self.split.take(offsets)
        targets[row_of_token, columns] = ids
        inputs = np.roll(ids, 1)
        inputs[before] = self.tokenizer.bos_id
        tokens[row_of_token, columns] = inputs
        fragment_ids[row_of_token, columns] = fragments[fragment_of_token]
        return Batch(*map(torch.from_numpy, (tokens, targets, fragment_ids)))

    def _fragments(self, rows: Ints) -> tuple[Ints, Ints]:
        """The fragments of these rows, and for each the index of its row."""
        first, end = self.packing.row_starts[rows], self.packing.row_starts[rows + 1]
        return _concatenate_ranges(first, end - first)


class TrainOrder:
    """The rows of each step: a seeded permutation per epoch, in order."""

    def __init__(self, num_rows: int, batch_rows: int, seed: int) -> None:
        self.num_rows, self.batch_rows, self.seed = num_rows, batch_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def rows(self, step: int) -> Ints:
        """Rows of one step, counted from 0."""
        positions = np.arange(step * self.batch_rows, (step + 1) * self.batch_rows)
        parts = []
        for epoch in np.unique(positions // self.num_rows).tolist():
            in_epoch = positions[positions // self.num_rows == epoch] % self.num_rows
            parts.append(self._epoch_order(epoch)[in_epoch])
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> Ints:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        return self._permutation


class PreparedData(NamedTuple):
    """A prepared dataset, opened for one run."""

    folder: Path
    tokenizer: Tokenizer
    train: Rows
    val: Rows
    record: DataRecord
    """What a run trained on it records."""
    lossy: bool
    """Whether the tokenizer lost a part of the text, so that bits per byte are those of the rest."""


def open_folder(config: RunConfig, folder: Path) -> PreparedData:
    """Open the prepared dataset of a folder; its training shards are not checked, which `moelm prepare` does.

    Raises:
        MoelmError: it is not prepared or damaged, or one of its splits is empty.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise MoelmError(f"The data of {config.name} is not prepared; run `moelm prepare` with its config first.")
    check_files(folder, manifest, shards_of=("val",))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    weights = [source.weight for source in config.data.sources]
    train = Rows(Split(folder, "train", manifest), config.data.seq_len, tokenizer, weights)
    val = Rows(Split(folder, "val", manifest), config.data.seq_len, tokenizer, [None] * len(weights))
    for rows, name in ((train, "training"), (val, "validation")):
        if not len(rows):
            raise MoelmError(
                f"The {name} split of the data is empty: {len(train.split.documents)} training and "
                f"{len(val.split.documents)} validation documents; add text, change data.val_fraction = "
                f"{config.data.val_fraction}, or set data.holdout=tail to hold out the end of each document."
            )
    hashes = manifest["data_sha256"], manifest["tokenizer_sha256"]
    evaluated = f"{manifest['eval_sha256']} {hashes[1]} {tokenizer.bos_id} {val.row_len}"
    record = DataRecord(str(folder), *hashes, hashlib.sha256(evaluated.encode()).hexdigest()[:16])
    lossy = any(source["unknown_characters"] or source["lost_characters"] for source in manifest["sources"])
    return PreparedData(folder, tokenizer, train, val, record, lossy)


def _packing(split: Split, row_len: int, weights: list[float | None]) -> Packing:
    """The packing of a split; that of many documents is saved beside the data, of which it is no part."""

    def build() -> Packing:
        documents = np.repeat(np.arange(len(split.documents)), _document_repeats(split, weights))
        packing = pack(split.documents["tokens"][documents].astype(np.int64), row_len)
        return packing._replace(document=documents[packing.document])

    if len(split.documents) < MIN_SAVED_DOCUMENTS:
        return build()
    key = hashlib.sha256(json.dumps([PACKING_VERSION, split.documents_sha256, weights]).encode()).hexdigest()[:16]
    return saved_packing(split.folder / "packing" / f"{split.name}-{row_len}-{key}.bin", build)


def _document_repeats(split: Split, weights: list[float | None]) -> Ints:
    """How often each document appears in an epoch, so that sources have their configured shares of the tokens.

    The source with the most tokens relative to its share appears once, and the others are repeated. A fractional repeat is
    applied to the documents with the largest hashes.
    """
    table = split.documents
    if all(weight is None for weight in weights):
        return np.ones(len(table), dtype=np.int64)
    shares = np.array([1.0 if weight is None else weight for weight in weights])
    tokens = np.bincount(table["source"], weights=table["tokens"], minlength=len(weights))
    per_token = np.divide(shares, tokens, out=np.zeros_like(shares), where=tokens > 0)
    repeats = (per_token / per_token[per_token > 0].min())[table["source"]]
    repeated: Ints = (repeats + table["hash"] / 2.0**64).astype(np.int64)
    return repeated


def _concatenate_ranges(starts: Ints, lengths: Ints) -> tuple[Ints, NDArray[np.int64]]:
    """Concatenated `range(start, start + length)`s, and the index of each element's range."""
    range_index = np.repeat(np.arange(len(starts)), lengths)
    offset = np.arange(len(range_index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts[range_index] + offset, range_index
