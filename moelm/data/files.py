"""Source files as bytes and lines of text: compression, encoding, and the errors of reading them.

Compression is recognized by the first bytes of a file, whatever its name; a file named .gz or .zst must be compressed so.
"""

import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import zstandard

from moelm.errors import MoelmError, first_line

SUFFIXES = {".gz": "gzip", ".gzip": "gzip", ".zst": "zst", ".zstd": "zst"}
"""Compressed formats by the ending of a name."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zst",
    b"PAR1\x15": "parquet",
    b"PK\x03\x04": "zip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"ARROW1\0\0": "Arrow",
    b"%PDF-": "PDF",
    b"SQLite format 3\0": "SQLite",
}
BOM = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8."""
_OTHER_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_HEAD_BYTES = 16
_SMALL_FILE_BYTES = 1 << 14
"""Bytes that are read at first; to allocate more takes longer than to read a small file."""
_ZSTD_READ_BYTES = 1 << 12
"""Compressed bytes that are decompressed at once; few, because they can hold 30,000 times as much text."""
_ZSTD_WINDOW_BYTES = 1 << 31
"""Largest window of `zstd --long`."""


def file_kind(head: bytes) -> str | None:
    """The name of the binary format that begins with these bytes; None if it is none of the known ones."""
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:
        return "zst"  # a skippable frame
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def bare_suffix(path: Path) -> str:
    """The ending of a file's name in lower case, without that of a compressed format."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in SUFFIXES else name.suffix


def compression(path: Path) -> str | None:
    """The compressed format of a file.

    Raises:
        MoelmError: not a regular file, or not what its name says.
    """
    with _open_stored(path) as (_, compressed_as):
        return compressed_as


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """The decompressed content of a file.

    Raises:
        MoelmError: not a regular file, or not what its name says.
    """
    with _open_stored(path) as (file, compressed_as):
        match compressed_as:
            case "gzip":
                with gzip.GzipFile(fileobj=file) as content:
                    yield cast(io.BufferedReader, content)
            case "zst":
                yield io.BufferedReader(_ZstdFile(path, file), 1 << 17)
            case _:
                yield file


def read_head(path: Path, size: int) -> bytes:
    """The first bytes of the decompressed content of a file."""
    with open_bytes(path) as file:
        head = file.read(min(size, _SMALL_FILE_BYTES))
        return head + file.read(size - len(head)) if len(head) == _SMALL_FILE_BYTES else head


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A file of UTF-8 text with its line ends unchanged; a byte order mark at the start is not text.

    Raises:
        MoelmError: a binary format or another encoding.
    """
    with open_bytes(path) as file:
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        if kind := file_kind(head):
            raise not_text(path, f"its content {'once decompressed ' if compression(path) else ''}is {kind} data")
        for mark, encoding in _OTHER_BOMS.items():
            if head.startswith(mark):
                raise not_text(path, f"it is encoded as {encoding}, and UTF-8 is expected")
        # Of a file that is a part of the mark alone, utf-8-sig would make an empty text.
        yield io.TextIOWrapper(file, "utf-8-sig" if head.startswith(BOM) else "utf-8", newline="")


def numbered_lines(path: Path, max_chars: int) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, with their ends.

    Raises:
        MoelmError: a zero byte, or a line longer than `max_chars`, before it fills the memory.
    """
    with open_text(path) as file:
        number = 0
        while line := file.readline(max_chars + 1):
            number += 1
            if "\0" in line:
                raise not_text(path, f"line {number} holds a zero byte")
            if len(line) > max_chars:
                raise too_long(f"{path}, line {number},", len(line), max_chars, at_least=True)
            yield number, line


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a file may raise into a `MoelmError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_text(path, f"byte 0x{error.object[error.start]:02x}{_undecodable_line(path)} is not UTF-8") from None
    except EOFError:
        raise MoelmError(f"{path} is not a whole gzip file.") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise MoelmError(f"{path} is not a whole gzip file: {str(error).rpartition(': ')[2]}.") from None
    except zstandard.ZstdError as error:
        reason = str(error).rpartition("error: ")[2]
        raise MoelmError(f"{path} is not a whole zst file: {reason}.") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {first_line(error.strerror or error)}.") from None


def read_through(path: Path) -> None:
    """Decompress a whole file, to see whether it is complete.

    Raises:
        MoelmError: it is not.
    """
    with reading(path), open_bytes(path) as file:
        while file.read(1 << 20):
            pass


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


def _undecodable_line(path: Path) -> str:
    """The place of the first line that is not UTF-8, as part of a sentence."""
    read_through(path)  # of a damaged archive, that is the error
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" in line {number}"
    return ""


@contextmanager
def _open_stored(path: Path) -> Iterator[tuple[io.BufferedReader, str | None]]:
    """A file as it is stored, and its compressed format."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise MoelmError(f"{path} is not a regular file; pipes and devices cannot be read.")
    with path.open("rb") as file:
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        kind = file_kind(head)
        named = SUFFIXES.get(path.suffix.lower())
        if named is not None and kind != named:
            content = "is empty" if not head else f"holds {kind} data" if kind else "is not compressed"
            raise MoelmError(f"{path} is not a {named} file, as its name says: it {content}.")
        yield file, kind if kind in ("gzip", "zst") else None


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    The readers of `zstandard` end silently where a file is cut; a frame's own decompressor knows whether it is complete.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._chunks = self._decompress()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _decompress(self) -> Iterator[bytes]:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        frame = None
        pending = b""
        while compressed := pending or self._file.read(_ZSTD_READ_BYTES):
            if frame is None:
                frame = decompressor.decompressobj()
            yield frame.decompress(compressed)
            pending = frame.unused_data
            if frame.eof:
                frame = None
        if frame is not None:
            raise MoelmError(f"{self._path} is not a whole zst file.")
