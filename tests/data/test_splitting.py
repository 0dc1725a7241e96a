"""The account of a source: what is read, kept, dropped and cut, and exact limits of documents and tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moelm.config import DataConfig
from moelm.data import dataset_writer
from moelm.data.prepare import prepare
from moelm.data.shards import Split, read_manifest
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError


def config(folder: Path, *sources: dict[str, Any], **changes: Any) -> DataConfig:
    plain = {"tokenizer": {"kind": "byte"}, "seq_len": 16, "val_fraction": 0.2, "dir": str(folder / "data")}
    return DataConfig.model_validate({**plain, **changes, "sources": list(sources)})


def write_lines(path: Path, lines: list[str], **settings: Any) -> dict[str, Any]:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return {"path": str(path), "documents": "line", **settings}


def accounts_of(data: DataConfig) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of prepared data, and the account of each source."""
    folder, _ = prepare(data)
    manifest = read_manifest(folder)
    assert manifest is not None
    return folder, manifest["sources"]


def prepared(data: DataConfig) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The accounts of the sources, and the kept texts of each in both splits."""
    folder, accounts = accounts_of(data)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    texts: list[list[str]] = [[] for _ in data.sources]
    for name in ("train", "val"):
        split = Split(folder, name, read_manifest(folder) or {})
        end = 0
        for row in split.documents:
            start, end = end, end + int(row["tokens"])
            text = tokenizer.decode(split.take(np.arange(start, end - 1)).tolist())
            assert row["bytes"] == len(text.encode())
            texts[row["source"]].append(text)
    return accounts, texts


def counts(account: dict[str, Any]) -> tuple[int, ...]:
    return tuple(account[name] for name in ("read", "kept", "duplicates", "blank", "cut", "tokens"))


LINES = ["", "first", "first", " ", "second", "third", "third", ""]


def test_every_document_is_accounted_for(tmp_path: Path) -> None:
    (account,), (texts,) = prepared(config(tmp_path, write_lines(tmp_path / "a.txt", LINES, name="a")))
    assert sorted(texts) == ["first\n", "second\n", "third\n"]
    assert account == {
        **{"label": "a", "read": 8, "kept": 3, "duplicates": 2, "blank": 3, "cut": 0, "tokens": 22},
        **{
            "bytes": 19,
            "characters": 19,
            "left_out_characters": 0,
            "unknown_tokens": 0,
            "unknown_characters": 0,
            "lost_characters": 0,
        },
    }


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_documents": 2}, (5, 2, 1, 2, 0, 15)),
        ({"max_documents": 3}, (6, 3, 1, 2, 0, 22)),
        ({"max_documents": 4}, (8, 3, 2, 3, 0, 22)),
        ({"max_tokens": 2}, (2, 1, 0, 1, 1, 2)),
        ({"max_tokens": 7}, (2, 1, 0, 1, 0, 7)),
        ({"max_tokens": 8}, (2, 1, 0, 1, 0, 7)),  # the end token alone is no document
        ({"max_tokens": 9}, (5, 2, 1, 2, 1, 9)),
        ({"max_tokens": 15}, (5, 2, 1, 2, 0, 15)),
        ({"max_tokens": 22, "max_documents": 2}, (5, 2, 1, 2, 0, 15)),
        ({"max_tokens": 1000}, (8, 3, 2, 3, 0, 22)),
    ],
)
def test_limits_count_what_is_kept(tmp_path: Path, limits: dict[str, int], expected: tuple[int, ...]) -> None:
    (account,), (texts,) = prepared(config(tmp_path, write_lines(tmp_path / "a.txt", LINES, **limits)))
    assert counts(account) == expected
    whole = "first\nsecond\nthird\n"
    assert sum(map(len, texts)) == account["bytes"]
    assert all(text in whole for text in texts)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text("ab 🙂é\n", min_size=1).filter(str.strip),
    limit=st.integers(7, 80),
    holdout=st.sampled_from(["documents", "tail"]),
)
def test_one_large_document_is_cut_at_the_limit(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int, holdout: str
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.txt").write_text(text, encoding="utf-8", newline="")
    data = config(folder, {"path": str(folder / "a.txt"), "max_tokens": limit}, holdout=holdout)
    assume(not text[: limit // 5].isspace())  # otherwise perhaps nothing is left
    (account,), (texts,) = prepared(data)
    start = "".join(texts)
    assert text.startswith(start)
    assert account["cut"] == (start != text)
    assert account["tokens"] == len(start.encode()) + len(texts) <= limit
    if start != text:
        assert len(text[: len(start) + 1].encode()) + 2 > limit - (holdout == "tail")


def test_the_tail_of_a_cut_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    (account,), (texts,) = prepared(
        config(tmp_path, {"path": str(tmp_path / "a.txt"), "max_tokens": 102}, holdout="tail", val_fraction=0.1)
    )
    assert counts(account) == (1, 1, 0, 0, 1, 102)
    assert [len(text) for text in texts] == [90, 10]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("batch_chars", [1, 40, 1 << 21])
def test_documents_beyond_a_limit_are_left_to_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, batch_chars: int
) -> None:
    monkeypatch.setattr(dataset_writer, "BATCH_CHARS", batch_chars)
    lines = [f"line {i}" for i in range(10, 60)]
    sources = [
        write_lines(tmp_path / "a.txt", lines, max_tokens=40),
        write_lines(tmp_path / "b.txt", lines[::-1], name="b"),
    ]
    accounts, texts = prepared(config(tmp_path, *sources, tokenizer={"kind": kind, "vocab_size": 260}))
    for account in accounts:
        assert account["read"] == account["kept"] + account["duplicates"] + account["blank"]
    assert accounts[0]["tokens"] in (39, 40)
    assert accounts[1]["read"] == 50
    assert accounts[1]["duplicates"] == accounts[0]["kept"]
    assert sorted(text for kept in texts for text in kept if text.endswith("\n")) == [
        f"{line}\n" for line in lines[: accounts[0]["kept"] - accounts[0]["cut"]] + lines[accounts[0]["kept"] :]
    ]


def test_sources_of_nothing_are_refused_or_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MoelmError, match=r"b.txt is empty: it contains no text"):
        prepare(config(tmp_path, write_lines(tmp_path / "a.txt", ["x"]), write_lines(tmp_path / "b.txt", ["", " "])))
    with pytest.raises(MoelmError, match="max_tokens = 1 leaves no document"):
        prepare(config(tmp_path, write_lines(tmp_path / "a.txt", ["x"], max_tokens=1)))
    same = write_lines(tmp_path / "b.txt", ["x"], name="b")
    accounts, _ = prepared(config(tmp_path, write_lines(tmp_path / "a.txt", ["x"]), same))
    assert counts(accounts[1]) == (1, 0, 1, 0, 0, 0)
    assert "nothing of b is kept" in capfd.readouterr().err


def test_characters_that_a_tokenizer_does_not_know_are_counted_and_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The character tokenizer is trained on the training split, so that it does not know a character of the other one."""
    lines = [f"{chr(0x4E00 + i)} plain" for i in range(50)]
    source = write_lines(tmp_path / "a.txt", lines, name="a")
    _, (account,) = accounts_of(config(tmp_path, source, tokenizer={"kind": "char"}, val_fraction=0.3))
    unknown = account["unknown_characters"]
    assert 0 < unknown < 50
    assert account["unknown_tokens"] == unknown
    assert account["characters"] == 50 * 8
    warning = " ".join(capfd.readouterr().err.split())
    assert (
        f"of the 400 characters of a, {unknown} ({unknown / 400:.2%}) become unknown tokens and 0 (0.00%) are lost"
        in warning
    )
    assert "bits/byte is not comparable" in warning
