"""A document, as sources yield it."""

import hashlib
from typing import Literal, NamedTuple


class Document(NamedTuple):
    """A text, its domain and its origin."""

    text: str
    domain: str
    origin: str
    """The file and line or row, for error messages."""
    split: Literal["train", "val"] | None = None
    """The split that the source assigns it to; None if the hash of its text decides."""
    left_out: int = 0
    """Characters that the source has left out of it."""


def text_digest(text: str, seed: int = 0) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "big")).digest(), "big")
