"""Packing of documents into rows of equal length: documents are split into fragments, which are packed best-fit decreasing.

Every token of a split is in exactly one row, and padding is below one percent (Ding et al. 2024, best-fit packing).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moelm.atomic import atomic_file
from moelm.console import warn

Ints = NDArray[np.int64]

PACKING_VERSION = 1
"""Number of the rules of packing and of the file's format; a change of either must increase it."""


class Packing(NamedTuple):
    """Fragments in row order; row r holds fragments `row_starts[r]` to `row_starts[r + 1]`."""

    document: Ints
    """Index of each fragment's document."""
    start: Ints
    """First token within the document."""
    length: Ints
    row_starts: Ints

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1


def pack(lengths: Ints, row_len: int) -> Packing:
    """Pack documents of these lengths in tokens into rows of `row_len`.

    Full rows come first, in document order; the loader shuffles rows.
    """
    full_rows = lengths // row_len
    document = np.repeat(np.arange(len(lengths)), full_rows)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(full_rows) - full_rows, full_rows)) * row_len
    remainder = lengths % row_len
    partial = np.flatnonzero(remainder)
    partial = partial[np.argsort(-remainder[partial], kind="stable")]
    row = np.concatenate((np.arange(len(document)), len(document) + _best_fit(remainder[partial], row_len)))
    document = np.concatenate((document, partial))
    start = np.concatenate((start, lengths[partial] - remainder[partial]))
    length = np.concatenate((np.full(len(row) - len(partial), row_len), remainder[partial]))
    order = np.argsort(row, kind="stable")
    num_rows = int(row.max()) + 1 if len(row) else 0
    row_starts = np.searchsorted(row[order], np.arange(num_rows + 1))
    return Packing(document[order], start[order], length[order], row_starts)


def saved_packing(path: Path, build: Callable[[], Packing]) -> Packing:
    """The packing in a file, memory-mapped, so that processes of a machine share it; built and saved where it is missing.

    Args:
        path: of a file of int64: the number of fragments, then the four arrays.
        build: returns the packing.
    """
    if (saved := _read_packing(path)) is not None:
        return saved
    packing = build()
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            np.concatenate(([len(packing.document)], *packing)).tofile(temporary)
    except OSError as error:
        warn(f"the packing of documents into rows cannot be saved ({error}); every process computes it at every start.")
    return _read_packing(path) or packing


def _read_packing(path: Path) -> Packing | None:
    """The packing in a file; None if the file is missing or not complete."""
    if not path.is_file() or path.stat().st_size % 8 or not path.stat().st_size:
        return None
    saved: Ints = np.memmap(path, dtype=np.int64, mode="r")
    fragments = int(saved[0])
    packing = Packing(*np.split(saved[1:], [fragments, 2 * fragments, 3 * fragments]))
    return packing if len(packing.row_starts) and packing.row_starts[-1] == fragments else None


def _best_fit(lengths: Ints, row_len: int) -> Ints:
    """The row of each fragment, given longest first: the fullest row with enough space, or a new one.

    Rows are held in one stack per free space; an integer with one bit per non-empty stack finds the tightest fit.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    stacks: list[list[int]] = [[] for _ in range(row_len + 1)]
    spaces = 0
    num_rows = 0
    for index, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = stacks[space].pop()
            if not stacks[space]:
                spaces &= ~(1 << space)
        else:
            space, row = row_len, num_rows
            num_rows += 1
        rows[index] = row
        free = space - length
        if free:
            stacks[free].append(row)
            spaces |= 1 << free
    return rows
