"""Readers of local files by format: text, JSON Lines, CSV (these also compressed) and Parquet.

A text reader yields documents. The other readers yield records (mappings) with their origin; `moelm.data.sources` selects
their columns.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moelm.config import SourceConfig
from moelm.data.document import Document
from moelm.errors import MoelmError

Records = Iterator[tuple[Any, str]]
Reader = Callable[[Path, SourceConfig, int], Records]
"""Arguments: file, source, and the maximum size of a document in bytes."""

COMPRESSED = (".gz", ".zst")
WHOLE_FILE_BYTES = 1 << 20
"""A text file up to this size is one document under `documents: auto`."""
PART_CHARS = 1 << 16
"""A larger one is divided at the first empty line after this many characters."""


def file_format(path: Path) -> str:
    """The suffix of a file without compression."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def read_text(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    """The documents of a text file, as `source.documents` divides it."""
    unit = source.documents
    if unit == "auto":
        unit = "file" if path.suffix not in COMPRESSED and path.stat().st_size <= WHOLE_FILE_BYTES else "auto"
    lines: list[str] = []
    start, chars = 1, 0
    for number, line in _numbered_lines(path, max_document_bytes):
        blank = line.isspace()
        ends = unit == "line" or (blank and (unit == "paragraph" or (unit == "auto" and chars >= PART_CHARS)))
        # Text without empty lines is divided at a line end.
        ends = ends or (unit == "auto" and chars + len(line) >= 4 * PART_CHARS)
        lines.append(line)
        chars += len(line)
        if chars > max_document_bytes:
            raise too_long(f"{path}, from line {start},", chars, max_document_bytes, at_least=True)
        if ends:
            yield Document("".join(lines), source.label, f"{path}, line {start}")
            lines, start, chars = [], number + 1, 0
    yield Document("".join(lines), source.label, f"{path}, line {start}")


def _read_jsonl(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    # Escape sequences can make a line six times as long as its text.
    for number, line in _numbered_lines(path, 6 * max_document_bytes + WHOLE_FILE_BYTES):
        if line.isspace():
            continue
        origin = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoelmError(f"{origin} is not valid JSON: {error.msg}.") from None
        if not isinstance(record, dict):
            raise MoelmError(f"{origin} is not a JSON object with a column {source.column!r}.")
        yield record, origin


def _read_csv(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    csv.field_size_limit(max_document_bytes)
    with _open_text(path) as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                yield {key: value for key, value in record.items() if key is not None}, f"{path}, line {reader.line_num}"
        except csv.Error as error:
            origin = f"{path}, line {reader.line_num + 1}"
            if "field larger" in str(error):
                raise too_long(origin, max_document_bytes, max_document_bytes, at_least=True) from None
            raise MoelmError(f"{origin} is not valid CSV: {error}.") from None


def _read_parquet(path: Path, source: SourceConfig, max_document_bytes: int) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        wanted = [source.column, *filter(None, [source.domain_column])]
        columns = [name for name in wanted if name in file.schema_arrow.names] or None
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield record, f"{path}, row {row}"
    except pyarrow.ArrowException as error:
        raise MoelmError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers of records by file format; all other files are text."""


def _open_text(path: Path) -> TextIO:
    """A file as UTF-8 text with its line ends unchanged."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    if path.suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), "utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _numbered_lines(path: Path, max_chars: int) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; a line longer than `max_chars` is refused before it fills the memory."""
    with _open_text(path) as file:
        number = 0
        while line := file.readline(max_chars + 1):
            number += 1
            if "\0" in line:
                raise not_text(path, f"line {number} holds a zero byte")
            if len(line) > max_chars:
                raise too_long(f"{path}, line {number}", len(line), max_chars, at_least=True)
            yield number, line


def not_text(path: Path, reason: str) -> MoelmError:
    """The error for a file that is not text."""
    return MoelmError(f"{path} is not a text file: {reason}.")


def too_long(origin: str, size: int, limit: int, at_least: bool = False) -> MoelmError:
    """The error for a document above `data.max_document_mb`."""
    amount = f"{'more than ' if at_least else ''}{size / 1e6:.3g} MB"
    return MoelmError(
        f"{origin} holds one document of {amount}; at most data.max_document_mb = {limit / 1e6:.3g} are accepted "
        "(increase it, or divide a text file with documents: line or paragraph)."
    )
