"""Passages of documents that are cut inside characters."""

from pathlib import Path

import pytest
import torch

from moelm.analyze.passages import sample_passages
from moelm.config import load_config
from moelm.data.prepare import prepare
from moelm.model import build_model
from moelm.runs.load import OpenedRun
from tests.conftest import fill, open_data
from tests.tokenizers import SHAPES


@pytest.mark.parametrize("shape", ["byte_level", "byte_fallback"])
def test_characters_of_several_tokens_are_whole(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    SHAPES[shape]().save("t.json")
    lines = [f"{number} 日本語の文章を書きます。" * 4 + "\n" for number in range(40)]
    Path("text.txt").write_text("".join(lines), encoding="utf-8")
    settings = ["data.tokenizer={kind: file, path: t.json}", "data.seq_len=19", "train.batch_tokens=19"]
    config = load_config("moe.yaml", settings)
    prepare(config.data)
    data = open_data(config)
    model = build_model(config.model.model_copy(update={"vocab_size": data.tokenizer.vocab_size}), 0).eval()
    run = OpenedRun(model, data.tokenizer, config, data.train, False, torch.device("cpu"), torch.float32)
    passages = [passage for seed in range(8) for passage in sample_passages(run, 100, seed)]
    for passage in passages:
        text = "".join(passage.texts)
        assert text
        assert any(text in line for line in lines), text
        assert {len(experts) for experts in passage.experts.values()} == {len(passage.texts)}
