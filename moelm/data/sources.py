"""Documents from where they are: the builtin corpus, local files, hub data sets. One stream per source, constant memory."""

import csv
import glob
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moelm.config import SourceConfig
from moelm.data.corpus.builtin import builtin_documents, builtin_fingerprint
from moelm.data.document import Document
from moelm.data.hub import hub_records
from moelm.errors import MoelmError

WHOLE_FILE_BYTES = 1 << 20
"""A text file up to this size is one document under `documents: auto`."""
PIECE_CHARS = 1 << 16
"""A longer one is cut at the first empty line after this many characters."""

Reader = Callable[[Path, SourceConfig, int], Iterator[tuple[Any, str]]]


def read_source(source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    """The documents of one source, in a fixed order; blank ones are left out.

    Raises:
        MoelmError: whatever is wrong with a file, naming it and the line or row.
    """
    if source.hub is not None:
        documents = _label(hub_records(source), source)
    elif source.path is not None:
        documents = (document for path in source_files(source) for document in _read_file(path, source, max_document_bytes))
    else:
        documents = builtin_documents()
    kept = 0
    for document in documents:
        if len(document.text) > max_document_bytes // 4 and len(document.text.encode()) > max_document_bytes:
            raise _too_long(document.place, len(document.text.encode()), max_document_bytes)
        if not document.text or document.text.isspace():
            continue
        kept += 1
        yield document
        if source.max_documents is not None and kept >= source.max_documents:
            return
    if not kept:
        raise MoelmError(f"{source.path or source.label} is empty: it holds no text to learn from.")


def source_fingerprint(source: SourceConfig) -> Any:
    """What a prepared data set depends on, cheap to ask: names, sizes and times of files, versions of packages."""
    if source.hub is not None:
        return source.hub
    if source.path is not None:
        stats = [(path, path.stat()) for path in source_files(source)]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return builtin_fingerprint()


def source_files(source: SourceConfig) -> list[Path]:
    """The files that a `path` names, sorted."""
    pattern = os.path.expanduser(source.path or "")
    if Path(pattern).is_dir():
        raise MoelmError(f"{pattern} is a directory; a file or a glob such as {pattern.rstrip('/')}/*.txt is expected.")
    if Path(pattern).is_file():
        return [Path(pattern)]
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        what = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise MoelmError(f"{source.path} {what}.")
    return paths


def _read_file(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    kind = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    readers: dict[str, Reader] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    try:
        if kind in readers:
            yield from _label(readers[kind](path, source, max_document_bytes), source)
        else:
            yield from _read_text(path, source, max_document_bytes)
    except UnicodeDecodeError as error:
        raise _not_text(path, f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except (gzip.BadGzipFile, EOFError):
        raise MoelmError(f"{path} is not a whole gzip file.") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror or error}.") from None


def _label(records: Iterator[tuple[Any, str]], source: SourceConfig) -> Iterator[Document]:
    """Turn records (mappings) into documents by the configured columns."""
    for record, place in records:
        for column in filter(None, (source.column, source.domain_column)):
            if column not in record:
                raise MoelmError(f"{place} has no column {column!r}; it has {', '.join(map(repr, record))}.")
        text = record[source.column]
        if not isinstance(text, str):
            raise MoelmError(f"{place}: column {source.column!r} holds {type(text).__name__}, not text.")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise MoelmError(f"{place}: column {source.column!r} holds half a surrogate pair, which is not text.")
        domain = str(record[source.domain_column]) if source.domain_column else source.label
        yield Document(text, domain, place)


def _open_text(path: Path) -> TextIO:
    """Text exactly as it is: UTF-8, line ends untouched."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    if path.suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), "utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _lines(path: Path, max_chars: int) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; one longer than `max_chars` is refused before it fills the memory."""
    with _open_text(path) as file:
        number = 0
        while line := file.readline(max_chars + 1):
            number += 1
            if "\0" in line:
                raise _not_text(path, f"line {number} holds a zero byte")
            if len(line) > max_chars:
                raise _too_long(f"{path}, line {number}", len(line), max_chars, at_least=True)
            yield number, line


def _read_text(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    unit = source.documents
    if unit == "auto":
        unit = "file" if path.suffix not in (".gz", ".zst") and path.stat().st_size <= WHOLE_FILE_BYTES else "auto"
    lines: list[str] = []
    start, chars = 1, 0
    for number, line in _lines(path, max_document_bytes):
        blank = line.isspace()
        ends = unit == "line" or (blank and (unit == "paragraph" or (unit == "auto" and chars >= PIECE_CHARS)))
        # Text without empty lines is cut at a line end, well before a document grows too long.
        ends = ends or (unit == "auto" and chars + len(line) >= 4 * PIECE_CHARS)
        lines.append(line)
        chars += len(line)
        if chars > max_document_bytes:
            raise _too_long(f"{path}, from line {start},", chars, max_document_bytes, at_least=True)
        if ends:
            yield Document("".join(lines), source.label, f"{path}, line {start}")
            lines, start, chars = [], number + 1, 0
    yield Document("".join(lines), source.label, f"{path}, line {start}")


def _read_jsonl(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[tuple[Any, str]]:
    # Escapes can make a line six times as long as its text.
    for number, line in _lines(path, 6 * max_document_bytes + WHOLE_FILE_BYTES):
        if line.isspace():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoelmError(f"{place} is not valid JSON: {error.msg}.") from None
        if not isinstance(record, dict):
            raise MoelmError(f"{place} is not a JSON object with a column {source.column!r}.")
        yield record, place


def _read_csv(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[tuple[Any, str]]:
    csv.field_size_limit(max_document_bytes)
    with _open_text(path) as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                yield (
                    {key: value for key, value in record.items() if key is not None},
                    f"{path}, line {reader.line_num}",
                )
        except csv.Error as error:
            if "field larger" in str(error):
                raise _too_long(
                    f"{path}, line {reader.line_num + 1}",
                    max_document_bytes,
                    max_document_bytes,
                    at_least=True,
                ) from None
            raise MoelmError(f"{path}, line {reader.line_num + 1} is not valid CSV: {error}.") from None


def _read_parquet(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[tuple[Any, str]]:
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


def _not_text(path: Path, why: str) -> MoelmError:
    return MoelmError(f"{path} is not a text file: {why}.")


def _too_long(place: str, size: int, limit: int, at_least: bool = False) -> MoelmError:
    amount = f"{'more than ' if at_least else ''}{size / 1e6:.3g} MB"
    return MoelmError(
        f"{place} holds one document of {amount}; at most data.max_document_mb = {limit / 1e6:.3g} are accepted "
        "(raise it, or cut a text file up with documents: line or paragraph)."
    )
