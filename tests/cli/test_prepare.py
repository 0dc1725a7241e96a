"""The account that `moelm prepare` prints."""

import json
from pathlib import Path

import pytest

from moelm.cli.prepare import prepare


def test_each_source_has_a_row_and_brackets_are_text(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    (workplace / "more.txt").write_text("one\n\none\ntwo\n")
    sources = (
        "[{path: text.txt, documents: line}, {path: more.txt, documents: line, domain: 'letters [/x]', max_tokens: 8}]"
    )
    overrides = [f"data.sources={sources}"]
    prepare(Path("moe.yaml"), overrides)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "letters",
        "[/x]",
        "4",
        "2",
        "1",
        "1",
        "1",
        "6",
        "0",
        "0",
        "0",
    ]
    prepare(Path("moe.yaml"), overrides)
    assert "was prepared before, and its files are as they were written" in capsys.readouterr().out
    prepare(Path("moe.yaml"), overrides, as_json=True)
    _, account = json.loads(capsys.readouterr().out)["sources"]
    assert [account[name] for name in ("read", "kept", "duplicates", "blank", "cut", "tokens")] == [4, 2, 1, 1, 1, 8]
