"""Compressed and encoded files: what their content and name say, where they are cut, and the sentences of damage."""

import bz2
import contextlib
import gzip
import lzma
import random
from pathlib import Path

import pytest
import zstandard

from moelm.data import files
from moelm.data.files import numbered_lines, open_bytes, read_through, reading
from moelm.errors import MoelmError

RANDOM = random.Random(0)
TEXT = "".join(f"line {RANDOM.random()}\n" for _ in range(300)).encode()
SKIPPABLE = b"\x53\x2a\x4d\x18\x08\0\0\0abcdefgh"


def frame_of_unknown_size(text: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False).compressobj()
    return compressor.compress(text) + compressor.flush()


FRAMES = [
    zstandard.ZstdCompressor(write_checksum=True).compress(TEXT[:900]),
    SKIPPABLE,
    frame_of_unknown_size(TEXT),
    zstandard.compress(b""),
    zstandard.compress(TEXT),
]
CONTENT = TEXT[:900] + TEXT + TEXT
BORDERS = {sum(map(len, FRAMES[:count])) for count in range(1, len(FRAMES) + 1)}


def content_of(path: Path) -> bytes:
    with reading(path), open_bytes(path) as file:
        return file.read()


def complaint(path: Path) -> str:
    with pytest.raises(MoelmError) as caught, reading(path):
        list(numbered_lines(path, 1 << 20))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_frames_of_zst_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(files, "_ZSTD_READ_BYTES", step)
    path = tmp_path / "a.zst"
    path.write_bytes(b"".join(FRAMES))
    assert content_of(path) == CONTENT


def test_a_cut_zst_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.txt.zst", b"".join(FRAMES)
    near = {border + offset for border in BORDERS for offset in range(-20, 21)}
    for cut in sorted(near | set(range(1, len(whole), 61))):
        path.write_bytes(whole[:cut])
        if cut in BORDERS or cut > len(whole):
            read_through(path)
        else:
            with pytest.raises(MoelmError, match=r"is not a (whole )?zst file"):
                read_through(path)


def test_a_cut_gzip_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path, members = tmp_path / "a.txt.gz", [gzip.compress(TEXT), gzip.compress(TEXT[:50])]
    whole = b"".join(members)
    for cut in {*range(1, 40), *range(len(members[0]) - 20, len(whole)), *range(40, len(whole), 101)}:
        path.write_bytes(whole[:cut])
        if cut != len(members[0]):
            with pytest.raises(MoelmError, match=r"is not a (whole )?gzip file"):
                read_through(path)
    path.write_bytes(whole)
    assert content_of(path) == TEXT + TEXT[:50]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_damaged_archive_is_never_read_as_other_text(tmp_path: Path, compress: type) -> None:
    if compress is zstandard.compress:
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = compress(TEXT)
    for position in range(0, len(whole), 37):
        path = tmp_path / "a.bin"
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        with contextlib.suppress(MoelmError):
            assert content_of(path) in (TEXT, path.read_bytes())


def test_long_windows_are_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(TEXT))
    assert content_of(tmp_path / "a.zst") == TEXT


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zst", b"plain text", "a.zst is not a zst file, as its name says: it is not compressed"),
        ("a.gz", b"", "a.gz is not a gzip file, as its name says: it is empty"),
        ("A.GZ", zstandard.compress(TEXT), "A.GZ is not a gzip file, as its name says: it holds zst data"),
        ("a.gz", gzip.compress(TEXT) + b"more", "a.gz is not a whole gzip file"),
        ("a.zst", zstandard.compress(TEXT) + b"\0\0\0\0", "a.zst is not a whole zst file"),
        ("a.gz", gzip.compress(b"caf\xe9\n")[:-8] + bytes(8), "a.gz is not a whole gzip file: CRC check failed"),
        ("a.gz", gzip.compress(gzip.compress(TEXT)), "its content once decompressed is gzip data"),
        ("a.txt", bz2.compress(TEXT), "its content is bzip2 data"),
        ("a.txt", lzma.compress(TEXT), "its content is xz data"),
        ("a.txt", b"PK\x03\x04", "its content is zip data"),
        ("a.txt", "text".encode("utf-16"), "it is encoded as UTF-16"),
        ("a.txt.gz", gzip.compress("text".encode("utf-32")), "it is encoded as UTF-32"),
        ("a.txt", "text".encode("utf-16-le"), "line 1 holds a zero byte"),
        ("a.txt", b"text\n" * 4000 + b"caf\xe9\n", "byte 0xe9 in line 4001 is not UTF-8"),
        ("a.txt.zst", zstandard.compress(b"one\ntwo\xff\n"), "byte 0xff in line 2 is not UTF-8"),
        ("a.txt", b"x" * (1 << 21), "a.txt, line 1, holds one document of more than"),
    ],
)
def test_other_content_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in complaint(tmp_path / name)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_compression_is_recognized_under_any_name_and_a_byte_order_mark_is_not_text(
    tmp_path: Path, compress: type, mark: bytes
) -> None:
    (tmp_path / "a").write_bytes(compress(mark + "é\r\nb\r".encode()))
    assert list(numbered_lines(tmp_path / "a", 100)) == [(1, "é\r\n"), (2, "b\r")]
