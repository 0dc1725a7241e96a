"""Documents into rows of equal length: fragment long ones, then fit what is left, longest first, where it fits best.

Every token of a split lands in exactly one row, and padding stays under a percent (Ding et al. 2024, best-fit packing).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


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
        """How many rows there are."""
        return len(self.row_starts) - 1


def pack(lengths: Ints, row_len: int) -> Packing:
    """Pack documents of these lengths in tokens into rows of `row_len`.

    Whole rows come first, in document order; the loader shuffles rows anyway.
    """
    whole = lengths // row_len
    document = np.repeat(np.arange(len(lengths)), whole)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)) * row_len
    rest = lengths % row_len
    left = np.flatnonzero(rest)
    left = left[np.argsort(-rest[left], kind="stable")]
    row = np.concatenate((np.arange(len(document)), len(document) + _best_fit(rest[left], row_len)))
    document = np.concatenate((document, left))
    start = np.concatenate((start, lengths[left] - rest[left]))
    length = np.concatenate((np.full(len(row) - len(left), row_len), rest[left]))
    order = np.argsort(row, kind="stable")
    num_rows = int(row.max()) + 1 if len(row) else 0
    row_starts = np.searchsorted(row[order], np.arange(num_rows + 1))
    return Packing(document[order], start[order], length[order], row_starts)


def _best_fit(lengths: Ints, row_len: int) -> Ints:
    """Row of each length, given longest first: the fullest row with enough room, else a new one.

    Rows wait in a stack per free space; an integer with one bit per non-empty stack finds the tightest fit at once.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    stacks: list[list[int]] = [[] for _ in range(row_len + 1)]
    spaces = 0
    opened = 0
    for index, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = stacks[space].pop()
            if not stacks[space]:
                spaces &= ~(1 << space)
        else:
            space, row = row_len, opened
            opened += 1
        rows[index] = row
        free = space - length
        if free:
            stacks[free].append(row)
            spaces |= 1 << free
    return rows
