"""One document, as every source yields it and `prepare` consumes it."""

from typing import NamedTuple


class Document(NamedTuple):
    """A text with its label and the place to name when something is wrong with it."""

    text: str
    domain: str
    place: str
    """Where it came from, for error sentences: a file, with a line or row where there is one."""
