"""A document, as sources yield it."""

from typing import NamedTuple


class Document(NamedTuple):
    """A text, its domain and its origin."""

    text: str
    domain: str
    origin: str
    """The file and line or row, for error messages."""
