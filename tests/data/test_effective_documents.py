"""The effective number of evaluation documents, and its warning."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moelm.cli.app import app
from moelm.data.effective_documents import FEW_DOCUMENTS, effective_documents, few_documents_warning


def test_equal_documents_count_fully_and_one_long_one_as_one() -> None:
    assert effective_documents([7] * 12) == pytest.approx(12)
    assert effective_documents([1_000_000, 1, 1, 1]) == pytest.approx(1, abs=1e-4)
    assert effective_documents([3, 1]) == pytest.approx(16 / 10)
    assert effective_documents([]) == 0


def test_the_warning_begins_below_the_limit() -> None:
    assert few_documents_warning(FEW_DOCUMENTS, FEW_DOCUMENTS) is None
    warning = few_documents_warning(130, 6.04)
    assert warning is not None
    assert "130 evaluation documents weigh as much as 6.0 of equal length" in warning


@pytest.mark.parametrize(("lengths", "few"), [([40] * 300, False), ([40] * 290 + [20_000] * 10, True)])
def test_prepare_prints_the_effective_number_and_warns_where_it_is_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lengths: list[int], few: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"{number} " + "a" * length}) for number, length in enumerate(lengths)]
    Path("texts.jsonl").write_text("\n".join(lines))
    settings = {
        "name": "x",
        "model": {"dim": 8, "num_layers": 1, "num_heads": 1, "ffn": {"kind": "dense", "hidden_dim": 8}},
        "data": {
            "sources": [{"path": "texts.jsonl"}],
            "tokenizer": {"kind": "byte"},
            "seq_len": 16,
            "val_fraction": 0.2,
        },
        "train": {"steps": 1, "batch_tokens": 16},
        "optim": {"lr": 1e-3},
    }
    Path("x.yaml").write_text(json.dumps(settings))
    for _ in range(2):  # while it is prepared, and afterwards
        result = CliRunner().invoke(app, ["prepare", "x.yaml"])
        assert result.exit_code == 0
        assert ("so an interval over them means little" in result.stderr) == few
        assert "the validation documents weigh as much as" in result.stdout
    as_json = json.loads(CliRunner().invoke(app, ["prepare", "x.yaml", "--json"]).stdout)
    assert (as_json["effective_val_documents"] < FEW_DOCUMENTS) == few
