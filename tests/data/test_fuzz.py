"""Mutated source files, manifests and tokenizers: a sentence, or what slower independent readers find. Seeded."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from moelm.config import DataConfig, SourceConfig
from moelm.data.prepare import prepare
from moelm.data.shards import Split, read_manifest
from moelm.data.sources import read_source
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from tests import tokenizers
from tests.mutations import count_accepted, mutate_bytes, mutated_files

RECORDS = [{"id": i, "text": f't{i} "q", é\n🙂', "kind": "a"} for i in range(12)]
JSON_LINES = "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(RECORDS)).encode()


def write_table(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text", "kind"], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def write_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


def read_whole_lines(text: str) -> list[str]:
    return [json.loads(line)["text"] for line in io.StringIO(text, newline="") if line.strip()]


def read_whole_json(text: str) -> list[str]:
    value = json.loads(text)
    return [record["text"] for record in (value if isinstance(value, list) else [value])]


def read_whole_table(delimiter: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
        assert {len(row) for row in rows} <= {len(header)}
        return [row[header.index("text")] for row in rows]

    return read


FILES: dict[str, tuple[bytes, Callable[[str], list[str]] | None]] = {
    "a.jsonl": (JSON_LINES, read_whole_lines),
    "a.json": (json.dumps(RECORDS, indent=1).encode(), read_whole_json),
    "b.json": (json.dumps(RECORDS).encode(), read_whole_json),
    "a.csv": (write_table(","), read_whole_table(",")),
    "a.tsv": (write_table("\t"), read_whole_table("\t")),
    "a.jsonl.gz": (gzip.compress(JSON_LINES), None),
    "a.jsonl.zst": (zstandard.ZstdCompressor(write_checksum=True).compress(JSON_LINES), None),
    "a.parquet": (write_parquet(), None),
    "a.parquet.zst": (zstandard.compress(write_parquet()), None),
}


def test_no_mutation_is_misread(tmp_path: Path) -> None:
    rng = random.Random(0)
    refused = read = 0
    for name, (content, read_whole) in FILES.items():
        path = tmp_path / name
        for _ in range(120):
            mutated = mutate_bytes(rng, content)
            path.write_bytes(mutated)
            source = SourceConfig(path=str(path), domain_column=rng.choice([None, "kind"]))
            try:
                found = [document.text for document in read_source(source, 10_000)]
            except MoelmError as error:
                assert "\n" not in str(error)  # noqa: PT017
                refused += 1
                continue
            read += 1
            if read_whole is not None:
                text = mutated.decode().removeprefix("\ufeff")
                assert found == (read_whole(text) if text else []), mutated
            elif name.startswith("a.jsonl"):
                assert found == [record["text"] for record in RECORDS], mutated
    assert refused > 500
    assert read > 50


def test_mutated_manifests_are_refused_or_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(60)))
    source = {"path": str(tmp_path / "a.txt"), "documents": "line"}
    plain = {"tokenizer": {"kind": "byte"}, "seq_len": 16, "val_fraction": 0.3, "dir": str(tmp_path / "data")}
    wanted = DataConfig.model_validate({**plain, "sources": [source]})
    folder, _ = prepare(wanted)
    valid = (folder / "manifest.json").read_bytes()
    whole = {split: tokens_of(folder, split) for split in ("train", "val")}
    rng, refused = random.Random(0), 0
    for _ in range(300):
        (folder / "manifest.json").write_bytes(mutate_bytes(rng, valid))
        try:
            prepare(wanted, verify=True)
            assert {split: tokens_of(folder, split) for split in whole} == whole
        except MoelmError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("shape", tokenizers.SHAPES)
def test_mutated_tokenizers_are_refused_or_encode(tmp_path: Path, shape: str) -> None:
    """An accepted one encodes without its start and end tokens and decodes to text."""
    path = tmp_path / "tokenizer.json"
    valid = json.loads(tokenizers.SHAPES[shape]().to_str())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode_batch(["the red </s> cat"])[0]
        assert not {tokenizer.bos_id, *tokenizer.eos_ids}.intersection(ids)
        assert max(ids, default=0) < tokenizer.vocab_size
        tokenizer.decode(ids)

    count_accepted(mutated_files([valid], 40, lambda tree: json.dumps(tree).encode()), read)


def tokens_of(folder: Path, split: str) -> list[int]:
    opened = Split(folder, split, read_manifest(folder) or {})
    tokens: list[int] = opened.take(np.arange(int(opened.documents["tokens"].sum()))).tolist()
    return tokens
