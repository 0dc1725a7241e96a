"""Prepared data, from files to rows of tokens: file formats, errors, interruption, packing and order."""

import csv
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from moelm.config import DataConfig
from moelm.data.loader import IGNORE, Rows, TrainOrder
from moelm.data.prepare import find_prepared, prepare, prepared_folder
from moelm.data.shards import Split, SplitWriter, read_manifest
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError

TEXTS = [f"document {i}: {'ab ' * (i % 7 + 1)}\r\nnaïve 🙂 e\u0301 <|eos|>" for i in range(60)]


def config(folder: Path, *sources: dict[str, Any], **changes: Any) -> DataConfig:
    plain = {"tokenizer": {"kind": "byte"}, "seq_len": 16, "val_fraction": 0.2, "dir": str(folder / "data")}
    return DataConfig.model_validate({**plain, **changes, "sources": list(sources)})


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    opened = Split(folder, split, manifest_of(folder))
    ids = opened.take(np.arange(int(opened.documents["tokens"].sum())))
    ends = np.cumsum(opened.documents["tokens"].astype(np.int64))
    assert (ids[ends - 1] == tokenizer.eos_id).all()
    return [tokenizer.decode(document[:-1].tolist()) for document in np.split(ids, ends[:-1])]


def write(path: Path, texts: list[str]) -> dict[str, Any]:
    records = [{"body": text, "kind": f"k{i % 2}"} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    name = path.name
    if name.endswith(".jsonl"):
        path.write_text(lines)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines.encode()))
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["body", "kind"])
            writer.writeheader()
            writer.writerows(records)
    else:
        pa.parquet.write_table(pa.Table.from_pylist(records), path)
    return {"path": str(path), "column": "body", "domain_column": "kind"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_text_is_not_modified(tmp_path: Path, name: str) -> None:
    folder, worked = prepare(config(tmp_path, write(tmp_path / name, TEXTS)))
    assert worked
    train, val = texts_of(folder, "train"), texts_of(folder, "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert val
    assert sorted(manifest_of(folder)["domains"]) == ["k0", "k1"]


def test_a_second_call_does_nothing_and_changed_input_makes_a_new_folder(tmp_path: Path) -> None:
    wanted = config(tmp_path, write(tmp_path / "a.jsonl", TEXTS))
    folder, _ = prepare(wanted)
    assert prepare(wanted) == (folder, False)
    write(tmp_path / "a.jsonl", [*TEXTS, "one more"])
    other, worked = prepare(wanted)
    assert worked
    assert other != folder
    assert set(texts_of(folder, "val")) <= set(texts_of(other, "val"))  # no document changed its split
    assert prepare(wanted.model_copy(update={"val_fraction": 0.3}))[0] not in (folder, other)


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    folder, _ = prepare(config(tmp_path, write(tmp_path / "a.jsonl", TEXTS + TEXTS)))
    assert manifest_of(folder)["duplicates"] == len(TEXTS)


def test_the_tail_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    folder, _ = prepare(config(tmp_path, {"path": str(tmp_path / "a.txt")}, holdout="tail", val_fraction=0.1))
    boundary = round(len(text) * 0.9)
    assert texts_of(folder, "train") == [text[:boundary]]
    assert texts_of(folder, "val") == [text[boundary:]]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_trained_tokenizers_round_trip(tmp_path: Path, kind: str) -> None:
    tokenizer = {"kind": kind, "vocab_size": 300}
    folder, _ = prepare(config(tmp_path, write(tmp_path / "a.jsonl", TEXTS), tokenizer=tokenizer))
    assert sorted(texts_of(folder, "train") + texts_of(folder, "val")) == sorted(TEXTS)
    if kind == "char":
        with pytest.raises(MoelmError, match="'ж'"):
            Tokenizer.load(folder / "tokenizer.json").encode_prompt("ж")


LONG = "x" * 50_000_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "does not exist"),
        ("a.txt", b"", "empty"),
        ("a.txt", b"\x89PNG\r\n", "not a text file"),
        ("a.txt", b"ab\0cd\n", "zero byte"),
        ("a.txt", LONG.encode(), "max_document_mb"),
        ("a.jsonl", b'{"body": "x"}\n{"body": \n', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n', "no column 'body'"),
        ("a.jsonl", b'{"body": 3}\n', "not text"),
        ("a.jsonl", b'{"body": "\\ud800"}\n', "surrogate"),
        ("a.jsonl", json.dumps({"body": LONG}).encode(), "50 MB"),
        ("a.csv", b"text\nx\n", "no column 'body'"),
        ("a.parquet", b"PAR1 nonsense", "parquet"),
        ("a.jsonl.gz", b"not gzip", "gzip"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    wanted = {"path": str(tmp_path / name), "column": "body"}
    with pytest.raises(MoelmError) as caught:
        prepare(config(tmp_path, wanted))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_a_hub_name_without_a_network_is_one_sentence(tmp_path: Path) -> None:
    program = (
        "from moelm.config import *; from moelm.data.prepare import prepare\n"
        "from moelm.errors import MoelmError\n"
        "c = DataConfig.model_validate({'sources': [{'hub': 'nobody/nothing'}], 'seq_len': 8})\n"
        "try: prepare(c)\nexcept MoelmError as e: print(e)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "nobody/nothing cannot be reached" in completed.stdout
    assert completed.stdout.count("\n") == 1


def test_a_local_directory_streams_like_the_hub(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", TEXTS)
    folder, _ = prepare(config(tmp_path, {"hub": str(tmp_path / "set"), "column": "body", "max_documents": 40}))
    assert sorted(texts_of(folder, "train") + texts_of(folder, "val")) == sorted(TEXTS[:40])


def test_a_killed_preparation_leaves_no_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [f"{i} " * 400 for i in range(3_000)])
    wanted = config(tmp_path, {"path": str(tmp_path / "a.jsonl"), "column": "body"})
    program = (
        "from moelm.config import *; from moelm.data.prepare import prepare; import sys\n"
        "prepare(DataConfig.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, wanted.model_dump_json()], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data").glob(".*.writing-*/train-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_manifest(prepared_folder(wanted)) is None
    folder, worked = prepare(wanted)
    assert worked
    assert list((tmp_path / "data").iterdir()) == [folder]


def write_lines(path: Path, count: int) -> dict[str, Any]:
    path.write_text("".join(f"line {i}\n" for i in range(count)))
    return {"path": str(path), "documents": "line"}


def test_prepared_data_outlives_its_sources(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = config(tmp_path, write_lines(tmp_path / "a.txt", 30))
    folder, _ = prepare(wanted)
    (tmp_path / "a.txt").unlink()
    capfd.readouterr()
    assert prepare(wanted) == (folder, False) == (find_prepared(wanted), False)
    assert str(folder) in "".join(capfd.readouterr().err.split("\n"))
    assert find_prepared(wanted, manifest_of(folder)["data_sha256"]) == folder
    assert find_prepared(wanted, "another") is None
    assert find_prepared(config(tmp_path, {"path": str(tmp_path / "a.txt")})) is None
    with pytest.raises(MoelmError, match="does not exist"):
        prepare(wanted.model_copy(update={"val_fraction": 0.3}))


def test_the_tokenizer_file_may_be_gone_too(tmp_path: Path) -> None:
    folder, _ = prepare(config(tmp_path, write_lines(tmp_path / "a.txt", 30)))
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((folder / "tokenizer.json").read_bytes())
    wanted = config(tmp_path, write_lines(tmp_path / "a.txt", 30), tokenizer={"kind": "file", "path": str(copy)})
    folder, _ = prepare(wanted)
    copy.unlink()
    assert prepare(wanted) == (folder, False)


def test_which_content_is_meant_must_be_known(tmp_path: Path) -> None:
    folders = []
    for count in (30, 31):
        wanted = config(tmp_path, write_lines(tmp_path / "a.txt", count))
        folders.append(prepare(wanted)[0])
    os.utime(tmp_path / "a.txt", (1, 1))
    same, worked = prepare(wanted)  # the same content under another name
    assert worked
    (tmp_path / "a.txt").unlink()
    with pytest.raises(MoelmError) as caught:
        prepare(wanted)
    assert str(folders[0]) in str(caught.value)
    assert str(min(folders[1], same)) in str(caught.value)
    assert find_prepared(wanted, manifest_of(folders[0])["data_sha256"]) == folders[0]


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "train.documents.bin", "val.documents.bin"])
def test_damaged_files_are_found(tmp_path: Path, name: str) -> None:
    wanted = config(tmp_path, write_lines(tmp_path / "a.txt", 30))
    folder, _ = prepare(wanted)
    assert prepare(wanted, verify=True) == (folder, False)
    whole = (folder / name).read_bytes()
    for damage in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], whole + b"\0", None):
        if damage is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damage)
        with pytest.raises(MoelmError, match=f"{folder} is damaged: {name}"):
            prepare(wanted, verify=True)
        if damage is None or len(damage) != len(whole):
            with pytest.raises(MoelmError, match=f"{folder} is damaged: {name}"):
                Split(folder, name[: -len(name.lstrip("trainvl"))], manifest_of(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "was prepared by another version of moelm"),
        (lambda m: m.update(domains=["other"]), "the hashes in manifest.json do not agree"),
        (lambda m: m.update(domains=None), "domains of manifest.json is not valid"),
        (lambda m: m.update(dtype="O"), "dtype of manifest.json is not valid"),
        (lambda m: m["splits"].pop("val"), "splits.val of manifest.json is not valid"),
        (lambda m: m["splits"]["val"].update(tokens=-1), "splits.val.tokens of manifest.json is not valid"),
        (lambda m: m["splits"]["val"]["shards"][0].update(file="/etc/passwd"), "file of manifest.json is not valid"),
        (lambda m: m.clear(), "of manifest.json is not valid"),
    ],
)
def test_damaged_manifests_are_found(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    wanted = config(tmp_path, write_lines(tmp_path / "a.txt", 30))
    folder, _ = prepare(wanted)
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MoelmError, match=message):
        prepare(wanted, verify=True)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(MoelmError, match=r"manifest.json is not valid JSON"):
        prepare(wanted)


def test_hashes_name_the_content(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.txt", 200)
    first = manifest_of(prepare(config(tmp_path, source))[0])
    assert first["data_sha256"] != first["eval_sha256"]
    os.utime(tmp_path / "a.txt", (1, 1))
    again = manifest_of(prepare(config(tmp_path, source))[0])
    assert [again[key] for key in ("data_sha256", "eval_sha256")] == [first[key] for key in ("data_sha256", "eval_sha256")]
    for change in ({"domain": "other"}, {"max_documents": 150}):
        other = manifest_of(prepare(config(tmp_path, {**source, **change}))[0])
        assert other["data_sha256"] != first["data_sha256"]
        assert other["eval_sha256"] != first["eval_sha256"]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(tmp_path, write_lines(tmp_path / "a.txt", 30))
    add = SplitWriter.add

    def append(self: SplitWriter, *values: Any) -> None:
        with (tmp_path / "a.txt").open("a") as file:
            file.write("more\n")
        add(self, *values)

    monkeypatch.setattr(SplitWriter, "add", append)
    with pytest.raises(MoelmError, match=r"a.txt has changed while it was read"):
        prepare(wanted)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(self: SplitWriter, *values: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(SplitWriter, "add", fail)
    reason = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded"}[code]
    with pytest.raises(MoelmError, match=f"cannot be written under .*: {reason}"):
        prepare(config(tmp_path, write_lines(tmp_path / "a.txt", 30)))
    assert list((tmp_path / "data").iterdir()) == []


def test_more_domains_and_sources_than_16_bits_count(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", vocab_size=300)
    writer.add([1, 2], size=1, domain=70_000, source=70_001, digest=2**64 - 1)
    manifest = {"splits": {"train": writer.close()}, "dtype": "<u2", "domains": ["x"] * 70_001}
    assert Split(tmp_path, "train", manifest).documents.tolist() == [(2, 1, 70_000, 70_001, 2**64 - 1)]
    with pytest.raises(MoelmError, match=r"train.documents.bin does not agree with the manifest"):
        Split(tmp_path, "train", {**manifest, "domains": ["x"]})


def test_rows_predict_every_token_once_after_a_start_token(tmp_path: Path) -> None:
    folder, _ = prepare(config(tmp_path, write(tmp_path / "a.jsonl", TEXTS)))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    split = Split(folder, "train", manifest_of(folder))
    rows = Rows(split, 16, tokenizer, [None])
    batch = rows.batch(np.arange(len(rows)))
    targets = batch.targets_BT[batch.targets_BT != IGNORE]
    assert sorted(targets.tolist()) == sorted(split.take(np.arange(int(split.documents["tokens"].sum()))).tolist())
    for tokens, targets, fragments in zip(*batch, strict=True):
        new = fragments.diff(prepend=fragments.new_tensor([-2])) != 0
        valid = fragments >= 0
        assert (tokens[new & valid] == tokenizer.bos_id).all()
        follows = (~new & valid).nonzero().flatten()
        assert (tokens[follows] == targets[follows - 1]).all()


def test_weights_are_shares_of_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{'a' * 20} {i}\n" for i in range(900)))
    (tmp_path / "b.txt").write_text("".join(f"{'b' * 20} {i}\n" for i in range(300)))
    sources = [{"path": str(tmp_path / f"{n}.txt"), "documents": "line", "weight": 1.0} for n in "ab"]
    folder, _ = prepare(config(tmp_path, *sources))
    split = Split(folder, "train", manifest_of(folder))
    rows = Rows(split, 16, Tokenizer.load(folder / "tokenizer.json"), [1.0, 1.0])
    share = np.bincount(split.documents["source"][rows.packing.document], weights=rows.packing.length)
    assert abs(share[0] / share.sum() - 0.5) < 0.02


def test_the_order_is_a_permutation_per_epoch_and_a_function_of_the_step() -> None:
    order = TrainOrder(num_rows=10, batch_rows=4, seed=1)
    seen = np.concatenate([order.rows(step) for step in range(5)])
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert list(seen[:10]) != list(seen[10:])
    assert list(TrainOrder(10, 4, 1).rows(3)) == list(order.rows(3))
