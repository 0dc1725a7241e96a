"""Documents of a source: the builtin corpus, local files, or a dataset of the hub; streamed in constant memory."""

import glob
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelm.config import SourceConfig
from moelm.data.corpus.builtin import builtin_documents, builtin_fingerprint
from moelm.data.document import Document
from moelm.data.hub import hub_records
from moelm.data.readers import READERS, Records, file_format, not_text, read_text, too_long
from moelm.errors import MoelmError


def read_source(source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    """The documents of one source in a fixed order, without blank ones.

    Raises:
        MoelmError: an unreadable or malformed file, with its line or row.
    """
    if source.hub is not None:
        documents = _select_columns(hub_records(source), source)
    elif source.path is not None:
        documents = (document for path in source_files(source) for document in _read_file(path, source, max_document_bytes))
    else:
        documents = builtin_documents()
    count = 0
    for document in documents:
        if len(document.text) > max_document_bytes // 4 and len(document.text.encode()) > max_document_bytes:
            raise too_long(document.origin, len(document.text.encode()), max_document_bytes)
        if not document.text or document.text.isspace():
            continue
        count += 1
        yield document
        if source.max_documents is not None and count >= source.max_documents:
            return
    if not count:
        raise MoelmError(f"{source.path or source.label} is empty: it contains no text.")


def source_fingerprint(source: SourceConfig) -> Any:
    """The state of a source, without reading it: names, sizes and times of files, or versions of packages."""
    if source.hub is not None:
        return source.hub
    if source.path is not None:
        stats = [(path, path.stat()) for path in source_files(source)]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return builtin_fingerprint()


def source_files(source: SourceConfig) -> list[Path]:
    """The files that a `path` matches, sorted.

    Raises:
        MoelmError: a directory, or no such file.
    """
    pattern = os.path.expanduser(source.path or "")
    if Path(pattern).is_dir():
        raise MoelmError(f"{pattern} is a directory; a file or a glob such as {pattern.rstrip('/')}/*.txt is expected.")
    if Path(pattern).is_file():
        return [Path(pattern)]
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise MoelmError(f"{source.path} {problem}.")
    return paths


def _read_file(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    reader = READERS.get(file_format(path))
    try:
        if reader is None:
            yield from read_text(path, source, max_document_bytes)
        else:
            yield from _select_columns(reader(path, source, max_document_bytes), source)
    except UnicodeDecodeError as error:
        raise not_text(path, f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
    except (gzip.BadGzipFile, EOFError):
        raise MoelmError(f"{path} is not a whole gzip file.") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror or error}.") from None


def _select_columns(records: Records, source: SourceConfig) -> Iterator[Document]:
    """Documents from the text and domain columns of records."""
    for record, origin in records:
        for column in filter(None, (source.column, source.domain_column)):
            if column not in record:
                raise MoelmError(f"{origin} has no column {column!r}; it has {', '.join(map(repr, record))}.")
        text = record[source.column]
        if not isinstance(text, str):
            raise MoelmError(f"{origin}: column {source.column!r} holds {type(text).__name__}, not text.")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise MoelmError(f"{origin}: column {source.column!r} holds half a surrogate pair, which is not text.")
        domain = str(record[source.domain_column]) if source.domain_column else source.label
        yield Document(text, domain, origin)
