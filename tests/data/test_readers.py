"""Documents of local files by format: JSON, CSV, TSV, Parquet and text, their columns, and what is malformed in them."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from moelm.config import SourceConfig
from moelm.data import json_records, readers
from moelm.data.document import Document
from moelm.data.sources import read_source
from moelm.errors import MoelmError

RECORDS = [{"id": i, "text": f'text {i},\t"quoted"\n[{{é 🙂'} for i in range(40)]
TEXTS = [record["text"] for record in RECORDS]


def documents(path: Path, **settings: Any) -> list[Document]:
    return list(read_source(SourceConfig(path=str(path), **settings), 1_000_000))


def texts(path: Path, **settings: Any) -> list[str]:
    return [document.text for document in documents(path, **settings)]


def as_table(delimiter: str, line_end: str = "\n") -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [f"{i}{delimiter}{text}" for i, text in enumerate(quoted)]
    return (line_end.join([f"id{delimiter}text", *rows]) + line_end).encode()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS).encode()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON_LINES),
        ("a.NDJSON", JSON_LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", JSON_LINES),
        ("a.json", ARRAY),
        ("a.JSON", json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + ARRAY),
        ("a.csv", b"\xef\xbb\xbf" + as_table(",")),
        ("a.Csv", as_table(",", "\r\n")),
        ("a.tsv", as_table("\t")),
        ("a.parquet", as_parquet()),
        ("a.txt", as_parquet()),
    ],
)
def test_every_format_is_read_compressed_or_not(tmp_path: Path, name: str, content: bytes, ending: str) -> None:
    path = tmp_path / f"{name}{ending}"
    compress = {"": bytes, ".zst": zstandard.compress}.get(ending, gzip.compress)
    path.write_bytes(compress(content))
    assert texts(path) == TEXTS
    assert [document.domain for document in documents(path, domain_column="id")] == [str(i) for i in range(40)]


def test_one_object_in_a_json_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[0], indent=1))
    assert texts(tmp_path / "a.json") == TEXTS[:1]


@given(
    records=st.lists(st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs"]))}), min_size=1),
    indent=st.sampled_from([None, 0, 3]),
    chunk=st.integers(1, 30),
)
def test_arrays_are_read_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], indent: int | None, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    path.write_text(json.dumps(records, indent=indent))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(json_records, "_CHUNK_CHARS", chunk)
        assert texts(path) == [record["text"] for record in records]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"} {"text": "y"}', "line 1 is not valid JSON: Extra data"),
        ("a.jsonl", b'{"text": "x", "y": NaN}', "line 1 is not valid JSON: NaN is not a JSON number"),
        ("a.jsonl", b'{"text": "x", "y": -Infinity}', "-Infinity is not a JSON number"),
        ("a.jsonl", b'{"text": "x", "y": ' + b"9" * 5000 + b"}", "a number has more than 4,300 digits"),
        ("a.jsonl", b'{"text": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "line 1 is not valid JSON: it is nested too"),
        ("a.json", b'[{"text": ' + b"[" * 99_999 + b"]" * 99_999 + b"}]", "item 1 in line 1 is not valid JSON: it is"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', "line 1 has the column 'text' twice"),
        ("a.jsonl", b'{"text": null}', "column 'text' holds no value, not text"),
        ("a.jsonl", b'{"text": ["x"]}', "column 'text' holds list, not text"),
        ("a.jsonl", b'{"text": "\\udc00"}', "column 'text' holds half a surrogate pair"),
        ("a.jsonl", b'"x"', "line 1 is not a JSON object"),
        ("a.json", b'[{"text": "x"}, 3]', "item 2 in line 1 is not a JSON object"),
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', "line 2 is not valid JSON"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "'{' is found where ',' is expected"),
        ("a.json", b'[{"text": "x"}', "the array has no end"),
        ("a.json", b'[{"text": "x"}, {"text": "y', "line 1 is not valid JSON: Unterminated string"),
        ("a.json", b'[{"text": "x"}] [', "text follows the end of the JSON array"),
        ("a.json", b'{\n"text":\n', "a.json is not valid JSON"),
        ("a.csv", b"text,id\nx,1\ny\n", "a.csv, line 3 has 1 fields, but the header has 2"),
        ("a.csv", b"text,id\nx,1,2\n", "a.csv, line 2 has 3 fields, but the header has 2"),
        ("a.csv", b"text,text\nx,1\n", "line 1: the header has the column 'text' twice"),
        ("a.csv", b"", "a.csv is empty: a header"),
        ("a.csv", b"id,body\n", "line 1 has no column 'text'; it has 'id', 'body'"),
        ("a.csv", b'text,id\nx,1\n"y,2\nz,3\n', "a.csv, line 3: the quote that opens a field here is never closed"),
        ("a.csv", b'text,id\n"x\n""y""\n","z,2\nw,3\n', "a.csv, line 4: the quote that opens a field here is never closed"),
        ("a.csv", b'text,id\n5" x,"y\n', "a.csv, line 2: the quote that opens a field here is never closed"),
        ("a.csv", b'text,id\n"x\ny" z,1\n', "line 3 is not valid CSV: text follows the closing quote of the field"),
        ("a.csv", b'text,id\nx,1\n"' + b"y\n" * 600_000, "line 3: the quoted field that opens here has no end within"),
        ("a.csv", b"text\n" + b"x" * 1_000_001, "line 2, holds one document of more than 1 MB"),
        ("a.tsv", b'text\tid\n"x\t1\n', "a.tsv, line 2: the quote that opens a field here is never closed"),
        ("a.csv", as_parquet(), "a.csv holds parquet data; rename it to end in .parquet"),
        ("a.parquet", as_parquet()[:-50], "a.parquet is not a readable parquet file"),
        ("a.parquet", JSON_LINES, "a.parquet is not a readable parquet file"),
        ("a.parquet.zst", zstandard.compress(as_parquet())[:-9], "a.parquet.zst is not a whole zst file"),
        ("a.txt", JSON_LINES, "a.txt looks like JSON Lines"),
        ("part-0", b'[{"text": "x"}, {"text": "y"}]', "part-0 looks like a JSON array of objects"),
        ("a.json.1", gzip.compress(b'\xef\xbb\xbf[\n {\n  "te\\"xt": 3\n }\n]'), "a.json.1 looks like a JSON array"),
        ("a.gz", gzip.compress(JSON_LINES), "a.gz looks like JSON Lines"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoelmError) as caught:
        documents(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    for columns, message in (
        ({"text": ["x", None]}, "row 2: column 'text' holds no value"),
        ({"text": [1]}, "row 1: column 'text' holds int, not text"),
        ({"body": pa.array([], pa.string())}, "a.parquet has no column 'text'; it has 'body'"),
        ({"text": invalid}, "a.parquet is not a readable parquet file"),
    ):
        write_parquet(path, **columns)
        with pytest.raises(MoelmError, match=message):
            documents(path)
    pyarrow.parquet.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)
    with pytest.raises(MoelmError, match="has the column 'text' twice"):
        documents(path)


def test_damaged_parquet_is_a_sentence_or_the_same_text(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), sink, write_page_checksum=True)
    whole, path = sink.getvalue().to_pybytes(), tmp_path / "a.parquet"
    for position in range(0, len(whole), 29):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with contextlib.suppress(MoelmError):
            assert texts(path) == TEXTS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "line 1 has no column 'kind'; it has 'text'"),
        ({"text": "x", "kind": None}, "column 'kind' holds no value, not a label"),
        ({"text": "x", "kind": 0.5}, "column 'kind' holds float, not a label"),
        ({"text": "x", "kind": True}, "column 'kind' holds bool, not a label"),
        ({"text": "x", "kind": " "}, "column 'kind' is blank"),
        ({"text": "x", "kind": "\ud800"}, "column 'kind' holds half a surrogate pair"),
    ],
)
def test_a_domain_is_a_label(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(MoelmError, match=message):
        documents(tmp_path / "a.jsonl", domain_column="kind")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "a.txt",
            {"column": "text"},
            "a.txt is a text file, as its name says, without columns; column: text does",
        ),
        ("a.txt", {"domain_column": "kind"}, "domain_column: kind does not apply"),
        ("a.jsonl", {"documents": "line"}, "a.jsonl is a file of records.* documents: line does not apply"),
    ],
)
def test_settings_of_other_formats_are_refused(tmp_path: Path, name: str, settings: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_bytes(JSON_LINES if name == "a.jsonl" else b"some text")
    with pytest.raises(MoelmError, match=message):
        documents(tmp_path / name, **settings)


def test_json_lines_are_text_where_the_config_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(JSON_LINES)
    assert texts(tmp_path / "a.txt", documents="file") == [JSON_LINES.decode()]


def test_what_a_document_is_in_a_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\na\nb\n\n\n\nc\n")
    assert texts(path) == texts(path, documents="file") == ["\n\na\nb\n\n\n\nc\n"]
    assert texts(path, documents="paragraph") == ["a\nb\n\n", "c\n"]
    assert texts(path, documents="line") == ["\n", "\n", "a\n", "b\n", "\n", "\n", "\n", "c\n"]
    monkeypatch.setattr(readers, "WHOLE_FILE_BYTES", 5)
    monkeypatch.setattr(readers, "PART_CHARS", 1)
    assert texts(path) == ["a\nb\n", "\nc\n"]
    compressed = tmp_path / "a.txt.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts(compressed) == texts(path)


def test_a_text_file_is_opened_for_its_head_and_for_its_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\n")
    opened: list[Path] = []

    def open_path(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_path)
    assert texts(path) == ["text\n"]
    assert opened == [path, path]


def test_empty_lines_in_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\ntext,id\n\nx,1\n\n")
    assert texts(tmp_path / "a.csv") == ["x"]
    (tmp_path / "b.csv").write_bytes(b"text\n\nx\n")
    assert texts(tmp_path / "b.csv") == ["", "x"]
