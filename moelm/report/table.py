"""A table of a report as text, built once for the terminal, Markdown and HTML."""

from dataclasses import dataclass

NO_VALUE = "–"
"""The cell of a value that is not known or does not exist."""


@dataclass(frozen=True)
class Table:
    """A table with a title; all cells are text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    """Number of leading text columns, which are left-aligned; the others hold numbers and are right-aligned."""

    def transpose(self) -> "Table":
        """The table with rows and columns exchanged."""
        head, *rows = zip(self.head, *self.rows, strict=True)
        return Table(self.title, ("", *head[1:]), tuple(rows))
