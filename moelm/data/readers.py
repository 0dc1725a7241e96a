"""Readers of local files by format: text, JSON, CSV, TSV and Parquet, each also compressed.

A text reader yields documents. The other readers yield records (mappings) with their origin; `moelm.data.sources` selects
their columns.
"""

import csv
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from moelm.config import SourceConfig
from moelm.data.document import Document
from moelm.data.files import (
    bare_suffix,
    compression,
    file_kind,
    numbered_lines,
    open_bytes,
    too_long,
)
from moelm.data.json_records import describe_json, read_json
from moelm.errors import MoelmError, first_line

Records = Iterator[tuple[dict[str, Any], str]]
Reader = Callable[[Path, SourceConfig, int], Records]
"""Arguments: file, source, and the maximum size of a document in bytes."""

WHOLE_FILE_BYTES = 1 << 20
"""A text file up to this size is one document under `documents: auto`."""
HEAD_BYTES = WHOLE_FILE_BYTES + 1
"""Bytes of a file's content that decide how it is read."""
PART_CHARS = 1 << 16
"""A larger one is divided at the first empty line after this many characters."""


def record_reader(path: Path, head: bytes) -> Reader | None:
    """The reader of a file of records, by its name or by its content if that is Parquet; None for a text file.

    Args:
        head: the first bytes of its content.

    Raises:
        MoelmError: Parquet under the name of another format.
    """
    suffix = bare_suffix(path)
    is_parquet = file_kind(head) == "parquet"
    if is_parquet and suffix in _READERS and _READERS[suffix] is not _read_parquet:
        raise MoelmError(f"{path} holds parquet data; rename it to end in .parquet.")
    return _read_parquet if is_parquet else _READERS.get(suffix)


def check_columns(names: Iterable[str], source: SourceConfig, origin: str) -> None:
    """Refuse a table or record without the columns of a source."""
    names = list(names)
    for column in source.columns:
        if column not in names:
            has = ", ".join(map(repr, names)) or "none"
            raise MoelmError(f"{origin} has no column {column!r}; it has {has}.")


def read_text(path: Path, head: bytes, source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    """The documents of a text file, as `source.documents` divides it.

    Args:
        head: the first bytes of its content, more than `WHOLE_FILE_BYTES` if it has as many.

    Raises:
        MoelmError: JSON under the name of a text file, unless `source.documents` says that it is text.
    """
    unit = source.documents or "auto"
    if source.documents is None and (looks_like := describe_json(path, head)) is not None:
        raise MoelmError(
            f"{path} looks like {looks_like} to read a column, or set documents: file, paragraph or line to read it as "
            "text."
        )
    if unit == "auto" and len(head) <= WHOLE_FILE_BYTES:
        unit = "file"
    lines: list[str] = []
    start, chars, only_blank = 1, 0, True
    for number, line in numbered_lines(path, max_document_bytes):
        blank = line.isspace()
        ends = unit == "line" or (blank and (unit == "paragraph" or (unit == "auto" and chars >= PART_CHARS)))
        # Text without empty lines is divided at a line end.
        ends = ends or (unit == "auto" and chars + len(line) >= 4 * PART_CHARS)
        lines.append(line)
        chars += len(line)
        only_blank = only_blank and blank
        if chars > max_document_bytes:
            raise too_long(f"{path}, from line {start},", chars, max_document_bytes, at_least=True)
        if ends:
            if unit == "line" or not only_blank:  # further empty lines between paragraphs are not documents
                yield Document("".join(lines), source.label, f"{path}, line {start}")
            lines, start, chars, only_blank = [], number + 1, 0, True
    if unit == "file" or not only_blank:
        yield Document("".join(lines), source.label, f"{path}, line {start}")


def _read_json(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    # Escape sequences can make an object six times as long as its text.
    yield from read_json(path, 6 * max_document_bytes + WHOLE_FILE_BYTES)


def _read_csv(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    yield from _read_table(path, source, ",", max_document_bytes)


def _read_tsv(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    yield from _read_table(path, source, "\t", max_document_bytes)


def _read_table(path: Path, source: SourceConfig, delimiter: str, max_document_bytes: int) -> Records:
    """Rows of fields that may be quoted, below a header; all of them have the header's number of fields."""
    csv.field_size_limit(max_document_bytes)
    max_line = 2 * max_document_bytes + WHOLE_FILE_BYTES
    reader = csv.reader((line for _, line in numbered_lines(path, max_line)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            lines = list(islice(numbered_lines(path, max_line), start - 1, reader.line_num))
            raise _table_error(path, delimiter, lines, str(error), max_document_bytes) from None
        origin = f"{path}, line {start}"
        if row is None:
            break
        if header is None and not row:
            continue
        if header is None:
            header = row
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise MoelmError(f"{origin}: the header has the column {repeated[0]!r} twice.")
            check_columns(header, source, f"{path}, line {start}")
            continue
        if not row and len(header) > 1:
            continue  # an empty line
        row = row or [""]
        if len(row) != len(header):
            raise MoelmError(f"{origin} has {len(row)} fields, but the header has {len(header)}.")
        yield dict(zip(header, row, strict=True)), origin
    if not header:
        raise MoelmError(f"{path} is empty: a header with the names of the columns is expected.")


def _table_error(
    path: Path, delimiter: str, lines: list[tuple[int, str]], reason: str, max_document_bytes: int
) -> MoelmError:
    """The sentence for a row that the csv module refuses.

    Args:
        lines: the numbered lines of the row.
    """
    opened = _malformed_field(delimiter, lines)
    if "unexpected end" in reason:
        return MoelmError(f"{path}, line {opened}: the quote that opens a field here is never closed.")
    if "field larger" in reason:
        if opened != lines[-1][0]:
            return MoelmError(
                f"{path}, line {opened}: the quoted field that opens here has no end within data.max_document_mb = "
                f"{max_document_bytes / 1e6:.3g}; close the quote, or increase data.max_document_mb."
            )
        return too_long(f"{path}, line {opened},", max_document_bytes, max_document_bytes, at_least=True)
    if "expected after" in reason:
        reason = f"text follows the closing quote of the field that opens in line {opened}"
    return MoelmError(f"{path}, line {lines[-1][0]} is not valid {'CSV' if delimiter == ',' else 'TSV'}: {reason}.")


def _malformed_field(delimiter: str, lines: list[tuple[int, str]]) -> int:
    """The line in which the first malformed field begins."""
    text = "".join(line for _, line in lines)
    field = re.compile(rf'(?:"[^"]*(?:""[^"]*)*"|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)(?:{delimiter}|\r\n?|\n)')
    at = 0
    while match := field.match(text, at):
        at = match.end()
    for number, line in lines:
        if at < len(line):
            return number
        at -= len(line)
    return lines[-1][0]


def _read_parquet(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    import pyarrow
    import pyarrow.parquet

    wanted = source.columns
    try:
        with _uncompressed(path) as plain:
            file = pyarrow.parquet.ParquetFile(plain, page_checksum_verification=True)
            names = file.schema_arrow.names
            if repeated := [name for name in wanted if names.count(name) > 1]:
                raise MoelmError(f"{path} has the column {repeated[0]!r} twice.")
            check_columns(names, source, str(path))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield record, f"{path}, row {row}"
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise MoelmError(f"{path} is not a readable parquet file: {first_line(error)}.") from None


@contextmanager
def _uncompressed(path: Path) -> Iterator[Path | BinaryIO]:
    """A file for random access: itself or, if it is compressed, its content in a temporary file."""
    if compression(path) is None:
        yield path
        return
    with tempfile.TemporaryFile() as copy:
        with open_bytes(path) as file:
            shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy


_READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""Readers of records by the ending of a file's name; all other files are text."""
