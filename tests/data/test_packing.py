"""Packing of documents into rows, and its file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelm.config import DataConfig
from moelm.data import loader
from moelm.data.loader import Rows
from moelm.data.packing import pack
from moelm.data.prepare import prepare
from moelm.data.shards import Split, read_manifest
from moelm.data.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prepared data of 120 documents of two sources."""
    for name, repeats in (("a", 5), ("b", 9)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name * repeats} {i}\n" for i in range(60)))
    sources = [{"path": str(tmp_path / f"{name}.txt"), "documents": "line", "weight": 1.0} for name in "ab"]
    data = {"sources": sources, "tokenizer": {"kind": "byte"}, "seq_len": 16, "dir": str(tmp_path / "data")}
    return prepare(DataConfig.model_validate(data))[0]


def open_rows(folder: Path, row_len: int = 16, weights: tuple[float, float] = (1.0, 1.0)) -> Rows:
    manifest = read_manifest(folder)
    assert manifest is not None
    return Rows(Split(folder, "train", manifest), row_len, Tokenizer.load(folder / "tokenizer.json"), list(weights))


def equal(first: Rows, second: Rows) -> bool:
    return all(map(np.array_equal, first.packing, second.packing))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), max_size=40), row_len=st.integers(1, 20))
def test_packing_places_every_token_once(lengths: list[int], row_len: int) -> None:
    packing = pack(np.array(lengths, dtype=np.int64), row_len)
    positions = sorted(
        (int(d), int(s) + i)
        for d, s, n in zip(packing.document, packing.start, packing.length, strict=True)
        for i in range(n)
    )
    assert positions == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    for row in range(packing.num_rows):
        inside = packing.length[packing.row_starts[row] : packing.row_starts[row + 1]].sum()
        assert 0 < inside <= row_len


def test_a_packing_is_saved_once_and_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in folder.iterdir())
    built = open_rows(folder)
    assert sorted(path.name for path in folder.iterdir()) == before, "that of few documents is not saved"
    monkeypatch.setattr(loader, "MIN_SAVED_DOCUMENTS", 0)
    assert equal(open_rows(folder), built)
    monkeypatch.setattr(loader, "pack", None)
    saved = open_rows(folder)
    assert equal(saved, built)
    assert isinstance(saved.packing.document, np.memmap)
    rows = np.arange(len(built))
    assert all(map(np.array_equal, saved.batch(rows), built.batch(rows)))
    assert saved.count_tokens(rows[3:7]) == built.count_tokens(rows[3:7]) == int(built.batch(rows[3:7]).valid_BT.sum())


def test_other_rows_have_other_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_of_rows = [(16, (1.0, 1.0)), (32, (1.0, 1.0)), (16, (1.0, 3.0))]
    built = [open_rows(folder, *each) for each in settings_of_rows]
    monkeypatch.setattr(loader, "MIN_SAVED_DOCUMENTS", 0)
    for _ in range(2):
        assert all(equal(open_rows(folder, *each), rows) for each, rows in zip(settings_of_rows, built, strict=True))
    assert len(list((folder / "packing").iterdir())) == 3


@pytest.mark.parametrize("size", [0, 40, 301, -8])
def test_an_incomplete_file_is_written_anew(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    built = open_rows(folder)
    monkeypatch.setattr(loader, "MIN_SAVED_DOCUMENTS", 0)
    open_rows(folder)
    (path,) = (folder / "packing").iterdir()
    complete = path.read_bytes()
    path.write_bytes(complete[:size])
    assert equal(open_rows(folder), built)
    assert path.read_bytes() == complete


def test_a_packing_that_cannot_be_saved_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = open_rows(folder)
    (folder / "packing").write_text("a file where the directory would be")
    monkeypatch.setattr(loader, "MIN_SAVED_DOCUMENTS", 0)
    assert equal(open_rows(folder), built)
    assert "Warning: the packing of documents into rows cannot be saved" in capsys.readouterr().err
