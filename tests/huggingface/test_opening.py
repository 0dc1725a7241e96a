"""Directories in the Hugging Face format, evaluated and analyzed without a run: the figures of their import."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moelm.analyze.report import analyze_run
from moelm.config import load_config
from moelm.data.prepare import prepare
from moelm.errors import MoelmError
from moelm.evaluation.losses import evaluate
from moelm.huggingface.importing import import_model
from moelm.huggingface.opening import load_model, open_model
from moelm.inference.generate import Sampling, generate_text, generate_tokens
from tests.conftest import Moelm, fill
from tests.huggingface.hf_models import SHAPE, build_hf_model, random_hf_model, save_hf_model
from tests.huggingface.peak_memory import peak_memory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models and a config of data."""
    monkeypatch.chdir(fill(tmp_path))
    for name in ("olmoe", "qwen2_moe-published"):
        save_hf_model(build_hf_model(name), tmp_path / name)
    data = {"sources": [{"path": "text.txt", "documents": "line"}], "seq_len": 32, "val_fraction": 0.2}
    config = {"data": data, "train": {"steps": 1, "batch_tokens": 32}, "optim": {"lr": 1e-3}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.usefixtures("no_figures")
def test_losses_and_routing_are_those_of_the_import(folder: Path, moelm: Moelm) -> None:
    evaluated = moelm("eval", "olmoe", "--data", "data.yaml", "--json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    import_model(Path("olmoe"), "imported", config=Path("data.yaml"))
    prepare(load_config("runs/imported/config.yaml").data)
    imported = open_model("imported", "last", "val")
    expected = evaluate(imported.model, imported.rows, torch.float32)
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(expected.overall.loss, rel=1e-6)
    settings: dict[str, Any] = {"split": "val", "checkpoint": "last", "tokens": 2000, "permutations": 9, "seed": 0}
    settings |= {"ablate": "layers", "ablate_tokens": 500}
    reports = [
        analyze_run("olmoe", Path("one"), **settings, data=Path("data.yaml")),
        analyze_run("imported", Path("two"), **settings),
    ]
    assert reports[1] is not None
    assert reports[0] == {**reports[1], "run": "olmoe"}
    assert not Path("runs/olmoe").exists()


def test_a_model_is_computed_in_the_dtype_of_its_weights(folder: Path) -> None:
    full = open_model("qwen2_moe-published", "last", "val", Path("data.yaml"))
    save_hf_model(build_hf_model("qwen2_moe-published").bfloat16(), folder / "half")
    half = open_model("half", "last", "val", Path("data.yaml"))
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert half.dtype == torch.bfloat16
    losses = [evaluate(each.model, each.rows, each.dtype).overall.loss for each in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_samples_are_those_of_the_import_and_in_the_dtype_of_the_weights(folder: Path) -> None:
    cpu, greedy = torch.device("cpu"), Sampling(12, temperature=0)
    import_model(Path("olmoe"), "imported", config=Path("data.yaml"))
    texts = [generate_text(*load_model(name, "last", cpu)[:2], ["the red"], greedy) for name in ("olmoe", "imported")]
    assert texts[0] == texts[1]
    save_hf_model(build_hf_model("qwen2_moe-published").bfloat16(), folder / "half")
    model, tokenizer, _ = load_model("half", "last", cpu)
    tokens = tokenizer.encode_batch(["the red"])
    with torch.no_grad():
        first = int(model(torch.tensor([[tokenizer.bos_id, *tokens[0]]])).logits[0, -1].argmax())
    sampled = list(generate_tokens(model, [[tokenizer.bos_id, *tokens[0]]], greedy, 1))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert sampled[0] == [first]
    assert len(sampled) == 12


def test_texts_begin_with_the_end_token_of_a_model_without_a_start_token(folder: Path) -> None:
    """As Qwen's do; the tokenizer must not get a token that the model was not trained with."""
    save_hf_model(build_hf_model("qwen2"), Path("a model"))
    path = Path("a model/tokenizer.json")
    path.write_text(path.read_text().replace("<|bos|>", "<|pad|>"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads(Path("a model", name).read_text())
        Path("a model", name).write_text(json.dumps({**settings, "bos_token_id": None}))
    opened = open_model("a model", "last", "val", Path("data.yaml"))
    assert opened.tokenizer.bos_id == opened.tokenizer.eos_id == 1
    batch = opened.rows.batch(np.arange(3))
    assert set(batch.tokens_BT[:, 0].tolist()) == {1}
    data = yaml.safe_load(Path("data.yaml").read_text())
    data["data"]["tokenizer"] = {"kind": "byte", "bos": 7}
    Path("other.yaml").write_text(yaml.safe_dump(data))
    assert open_model("a model", "last", "val", Path("other.yaml")).tokenizer.bos_id == 7


@pytest.mark.usefixtures("no_figures")
def test_streamed_layers_give_the_same_figures(folder: Path) -> None:
    settings: dict[str, Any] = {"split": "val", "checkpoint": "last", "tokens": 2000, "permutations": 9, "seed": 0}
    settings["data"] = Path("data.yaml")
    reports = [
        analyze_run("qwen2_moe-published", Path(f"out-{stream}"), **settings, stream_layers=stream)
        for stream in (False, True)
    ]
    assert reports[0] == reports[1]
    streamed = open_model("qwen2_moe-published", "last", "val", Path("data.yaml"), stream_layers=True)
    assert {str(weight.device) for weight in streamed.model.layers.parameters()} == {"meta"}
    with pytest.raises(MoelmError, match="--stream-layers needs --ablate none"):
        analyze_run("qwen2_moe-published", Path("new"), **settings, stream_layers=True, ablate="layers")


ANALYZE = """
import moelm.analyze.report, moelm.data.prepare

def run(name):
    moelm.analyze.report.analyze_run(
        name, Path(f"out-{name}"), "val", "last", 600, 9, 0, data=Path("data.yaml"), stream_layers=True
    )

run("olmoe")  # libraries, figures and the text
"""


@pytest.mark.slow(seconds=30)
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_streamed_layers_is_near_that_of_one(folder: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 60, "num_attention_heads": 8}
    model = random_hf_model("olmoe", {**SHAPE, **large, "num_experts": 16, "num_experts_per_tok": 2}, "large").bfloat16()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    save_hf_model(model, folder / "large", max_shard_size="60MB")
    del model
    layer, peak = size / 60, peak_memory(ANALYZE, 'run("large")')
    assert peak < 2 * layer + 100  # its tensors in the file, its stacked weights; activations and figures
    assert size > 10 * peak


def test_errors_are_sentences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoelmError, match="a run has its own data"):
        open_model("imported", "last", "val", Path("data.yaml"))
    with pytest.raises(MoelmError, match="--stream-layers reads directories in the Hugging Face format"):
        open_model("imported", "last", "val", stream_layers=True)
    with pytest.raises(MoelmError, match=r"missing\.yaml"):
        open_model("olmoe", "last", "val", Path("missing.yaml"))
    with pytest.raises(MoelmError, match="--checkpoint is best"):
        open_model("olmoe", "best", "val", Path("data.yaml"))
    for content in ("{}", "data: 3", "data:", "data: {seq_len: 8}"):
        Path("wrong.yaml").write_text(content)
        with pytest.raises(MoelmError, match=r"data"):
            open_model("olmoe", "last", "val", Path("wrong.yaml"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MoelmError, match="which one process reads"):
        open_model("olmoe", "last", "val", Path("data.yaml"))
