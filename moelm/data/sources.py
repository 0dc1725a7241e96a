"""Documents of a source: the builtin corpus, local files, or a dataset of the hub; streamed in constant memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelm.config import SourceConfig
from moelm.data.corpus.builtin import builtin_documents, builtin_fingerprint, split_corpus
from moelm.data.document import Document
from moelm.data.files import read_head, reading, too_long
from moelm.data.hub import hub_records
from moelm.data.json_records import REPEATED
from moelm.data.paths import files_below, matching_files
from moelm.data.readers import HEAD_BYTES, Records, check_columns, read_text, record_reader
from moelm.errors import MoelmError


def read_source(
    source: SourceConfig, max_document_bytes: int, val_fraction: float | None = None, split_seed: int = 0
) -> Iterator[Document]:
    """The documents of one source in a fixed order, blank ones included.

    Args:
        val_fraction: part of the builtin corpus that is held out; None if its documents are not assigned to splits.
        split_seed: selects the documents that are held out of it.

    Raises:
        MoelmError: an unreadable or malformed file, with its line or row.
    """
    if source.hub is not None:
        documents = _select_columns(hub_records(source), source)
    elif source.path is not None:
        files = matching_files(source.path)
        documents = (document for path in files for document in _read_file(path, source, max_document_bytes))
    elif val_fraction is not None:
        documents = split_corpus(val_fraction, split_seed, source.max_documents)
    else:
        documents = builtin_documents()
    for document in documents:
        if len(document.text) > max_document_bytes // 4 and len(document.text.encode()) > max_document_bytes:
            raise too_long(document.origin, len(document.text.encode()), max_document_bytes)
        yield document


def source_fingerprint(source: SourceConfig) -> Any:
    """The state of a source, without reading it.

    It is the names, sizes and times of files, the versions of packages, or a name on the hub.
    """
    if source.path is None and source.hub is None:
        return builtin_fingerprint()
    folder = Path(source.hub or "")
    if source.hub is not None and not folder.is_dir():
        return source.hub
    try:
        files = files_below(folder) if source.path is None else matching_files(source.path)
        return [[str(path), state.st_size, state.st_mtime_ns] for path in files for state in [path.stat()]]
    except OSError as error:
        raise MoelmError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _read_file(path: Path, source: SourceConfig, max_document_bytes: int) -> Iterator[Document]:
    with reading(path):
        head = read_head(path, HEAD_BYTES)
        reader = record_reader(path, head)
        if reader is None:
            for document in read_text(path, head, source, max_document_bytes):
                if document.text.strip():  # of a binary or empty file, that is the error
                    _refuse(path, source, ("column", "domain_column"), "a text file, as its name says, without columns")
                yield document
        else:
            _refuse(path, source, ("documents",), "a file of records, each of which is one document")
            yield from _select_columns(reader(path, source, max_document_bytes), source)


def _refuse(path: Path, source: SourceConfig, settings: tuple[str, ...], kind: str) -> None:
    """Refuse settings that do not apply to a file of this kind."""
    for name in settings:
        if (value := getattr(source, name)) is not None:
            raise MoelmError(
                f"{path} is {kind}; {name}: {value} does not apply to it (files of different kinds are different sources)."
            )


def _select_columns(records: Records, source: SourceConfig) -> Iterator[Document]:
    """Documents from the text and domain columns of records."""
    for record, origin in records:
        check_columns(record, source, origin)
        text = _cell(record, source.text_column, origin)
        if not isinstance(text, str):
            raise _wrong_type(origin, source.text_column, text, "text")
        domain = source.label
        if source.domain_column is not None:
            label = _cell(record, source.domain_column, origin)
            if not isinstance(label, str | int) or isinstance(label, bool):
                raise _wrong_type(origin, source.domain_column, label, "a label")
            domain = str(label)
            if not domain or domain.isspace():
                raise MoelmError(f"{origin}: column {source.domain_column!r} is blank, and a label is expected.")
        yield Document(text, domain, origin)


def _cell(record: dict[str, Any], column: str, origin: str) -> Any:
    """One value of a record; text is free of lone surrogates."""
    value = record[column]
    if value is REPEATED:
        raise MoelmError(f"{origin} has the column {column!r} twice.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MoelmError(f"{origin}: column {column!r} holds half a surrogate pair, which is not text.") from None
    return value


def _wrong_type(origin: str, column: str, value: Any, expected: str) -> MoelmError:
    found = "no value" if value is None else type(value).__name__
    return MoelmError(f"{origin}: column {column!r} holds {found}, not {expected}.")
