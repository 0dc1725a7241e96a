"""What import accepts, and what it refuses with names and leaves nothing of."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelm.analysis.routing.report import analyze_run
from moelm.commands import evaluate_run
from moelm.config import load_config
from moelm.data.prepare import prepare
from moelm.errors import MoelmError
from moelm.interop.export import export_run
from moelm.interop.importing import import_model
from moelm.interop.reading import read_settings
from moelm.interop.upcycle import upcycle_run
from moelm.rundir import RunDirectory, load_run
from moelm.train.launch import train
from tests.conftest import Moelm, fill
from tests.interop.peers import CASES, SHAPE, build, save, transformers

Weights = dict[str, Tensor]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small Mixtral in it."""
    monkeypatch.chdir(tmp_path)
    return save(build("mixtral-tied-window"), tmp_path / "hf")


def logits(run: str) -> Tensor:
    with torch.no_grad():
        return load_run(run)[0](torch.arange(40)[None]).logits


@pytest.mark.parametrize("options", [{"save_original_format": False}, {"max_shard_size": "20KB"}])
def test_the_fused_layout_and_shards_give_the_same(here: Path, options: dict[str, Any]) -> None:
    save(transformers.AutoModelForCausalLM.from_pretrained(here), Path("other"), **options)
    if "max_shard_size" in options:
        assert len(list(Path("other").glob("*.safetensors"))) > 2
    else:
        assert any("gate_up_proj" in name for name in load_file("other/model.safetensors"))
    import_model(here, "one")
    import_model(Path("other"), "two")
    assert torch.equal(logits("one"), logits("two"))


def test_older_spellings_are_understood(here: Path) -> None:
    settings = json.loads((here / "config.json").read_text())
    theta = settings.pop("rope_parameters")["rope_theta"]
    (here / "config.json").write_text(json.dumps({**settings, "rope_theta": theta, "rope_scaling": None}))
    weights = load_file(here / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, here / "model.safetensors")
    import_model(here, "old")
    assert load_config("runs/old/config.yaml").model.rope_theta == theta


def rename(weights: Weights) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(24)
    del weights["model.norm.weight"]


def reshape(weights: Weights) -> None:
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.ones(5, 24)


def untie(weights: Weights) -> None:
    weights["lm_head.weight"] = torch.ones(263, 24)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (rename, "no place in the model: model.layers.0.self_attn.q_proj.bias; no tensor in the files: model.norm.weight"),
        (reshape, r"another shape: model.layers.1.self_attn.k_proj.weight \(5x24 in place of 12x24\)"),
        (untie, "lm_head.weight is another matrix"),
    ],
)
def test_tensors_that_do_not_fit_stop_it_by_name(here: Path, spoil: Callable[[Weights], None], told: str) -> None:
    weights = load_file(here / "model.safetensors")
    spoil(weights)
    save_file(weights, here / "model.safetensors")
    with pytest.raises(MoelmError, match=told):
        import_model(here, "run")
    assert sorted(path.name for path in Path().iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; one of llama"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"rms_norm_eps": None}, "hf/config.json: rms_norm_eps is missing"),
        ({"rope_parameters": None}, "rope_theta is missing"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"rope_parameters": "abc"}, "rope_parameters is 'abc'; a section is expected"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'; a number is expected"),
        ({"intermediate_size": 0}, "intermediate_size is 0; a whole number above 0 is expected"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"model_type": 7}, "model_type is 7; text is expected"),
        ({"num_attention_heads": 5}, "num_heads = 5 does not divide"),
        ({"vocab_size": 200}, "has 258 tokens"),
    ],
)
def test_settings_that_moelm_does_not_have_are_named(here: Path, changes: dict[str, Any], told: str) -> None:
    settings = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(MoelmError, match=told):
        import_model(here, "run")
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_missing_setting_means_what_the_library_makes_of_it_or_stops_the_import(case: str) -> None:
    kind = CASES[case][0]
    told = json.loads(build(case).config.to_json_string(use_diff=False))
    for key in {"rms_norm_eps", "norm_topk_prob", "rope_parameters", "sliding_window", "tie_word_embeddings"} & told.keys():
        given = {name: value for name, value in told.items() if name != key}
        settings = {name: value for name, value in given.items() if name != "model_type"}
        filled = {**given, key: getattr(transformers.AutoConfig.for_model(kind, **settings), key)}
        with contextlib.suppress(MoelmError):
            found = read_settings(given, "config.json")
            assert found == read_settings(filled, "config.json"), key


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, 4),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}, 4),
    ],
)
def test_windows_that_are_said_by_layer(settings: dict[str, Any], window: int | None) -> None:
    told = {**SHAPE, "model_type": "qwen3", "head_dim": 6, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    assert read_settings({**told, **settings}, "config.json")[1]["window"] == window
    mixed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(MoelmError, match="some layers slide and some do not"):
        read_settings({**told, **mixed}, "config.json")


@pytest.mark.parametrize(
    "word", ["name=x", "start.run=x", "model.dim=8", "data.tokenizer.kind=bpe", "model.ffn.router.kind=hash"]
)
def test_words_that_would_make_it_another_model_are_refused(here: Path, word: str) -> None:
    with pytest.raises(MoelmError, match="cannot be chosen here, where the weights decide"):
        import_model(here, "run", [word])


def test_start_and_end_tokens_must_be_the_models_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({**settings, "eos_token_id": [7, 1]}))
    import_model(here, "run")
    assert "eos_token_id is 7 in config.json, but moelm takes 1 (<|eos|>)" in capsys.readouterr().err
    text = (here / "tokenizer.json").read_text().replace("<|bos|>", "[S]").replace("<|eos|>", "[E]")
    (here / "tokenizer.json").write_text(text)
    with pytest.raises(MoelmError, match=r"<\|bos\|>, <\|eos\|> would be new to the model"):
        import_model(here, "other")


def test_an_index_must_tell_the_truth(here: Path) -> None:
    save(transformers.AutoModelForCausalLM.from_pretrained(here), Path("cut"), max_shard_size="20KB")
    index = Path("cut/model.safetensors.index.json")
    told = json.loads(index.read_text())
    held = list(told["weight_map"].values())
    name, file = next((name, file) for name, file in told["weight_map"].items() if held.count(file) > 1)
    other = next(each for each in held if each != file)
    for weight_map, sentence in (
        ({**told["weight_map"], name: other}, f"has {name} in cut/{other}, but it is in cut/{file}"),
        ({**told["weight_map"], "more": file}, f"has more in cut/{file}, but it is in None"),
        ([], "has no weight_map"),
        ({"a": 1}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(MoelmError, match=re.escape(sentence)):
            import_model(Path("cut"), "run")
    index.write_text(json.dumps(told))
    save_file({**load_file(f"cut/{other}"), name: torch.ones(1)}, f"cut/{other}")
    with pytest.raises(MoelmError, match=f"{name} is in .* and in "):
        import_model(Path("cut"), "run")


def test_whole_numbers_are_no_weights(here: Path) -> None:
    weights = load_file(here / "model.safetensors")
    save_file({name: weight.int() for name, weight in weights.items()}, here / "model.safetensors")
    with pytest.raises(MoelmError, match=r"is torch.int32; floating-point weights are expected"):
        import_model(here, "run")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", None, "There is no hf/config.json"),
        ("config.json", "{", "cannot be read as JSON"),
        ("tokenizer.json", None, "--tokenizer"),
        ("tokenizer.json", "[]", "not a tokenizer.json"),
        ("model.safetensors", None, "There is no hf/model.safetensors"),
        ("model.safetensors", "nonsense", "cannot be read as safetensors"),
    ],
)
def test_files_that_are_not_there_are_named(here: Path, name: str, content: str | None, told: str) -> None:
    (here / name).unlink()
    if content is not None:
        (here / name).write_text(content)
    with pytest.raises(MoelmError, match=told):
        import_model(Path("hf"), "run")
    assert not Path("runs").exists()


def test_a_run_that_is_there_is_kept(here: Path) -> None:
    run = import_model(here, "run", ["data.seq_len=32", "model.ffn.balance.aux=0.5"])
    config = load_config(run.config)
    assert (config.data.seq_len, config.model.ffn.balance.aux) == (32, 0.5)  # type: ignore[union-attr]
    with pytest.raises(MoelmError, match="exists already"):
        import_model(here, "run")


def test_a_disk_that_fills_up_leaves_nothing(here: Path) -> None:
    """The limit on the size of a file stands for a full disk."""
    resource = pytest.importorskip("resource")
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, whole[1]))
    try:
        with pytest.raises(MoelmError, match="The run runs/run cannot be written"):
            import_model(here, "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert list(Path("runs").iterdir()) == []


def test_what_a_killed_import_left_goes_with_the_next(here: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getppid()):
        Path(f"runs/.old.writing-{platform.node()}-{process}").mkdir(parents=True)
        Path(f"runs/.old.writing-elsewhere-{process}").mkdir()
    import_model(here, "run")
    left = {f".old.writing-elsewhere-{ended.pid}", f".old.writing-elsewhere-{os.getppid()}"}
    left.add(f".old.writing-{platform.node()}-{os.getppid()}")
    assert {path.name for path in Path("runs").iterdir()} == {*left, "run"}


def test_it_is_evaluated_and_trained_on(here: Path) -> None:
    def fit(*words: str) -> None:
        config = load_config("runs/base/config.yaml", words)
        train(config, RunDirectory(Path("runs") / config.name))

    def loss(run: str, checkpoint: str = "last") -> float:
        evaluation = evaluate_run(run, "val", checkpoint)
        assert evaluation is not None
        return evaluation.overall.loss

    fill(Path())
    import_model(here, "base", ["train.steps=4", "optim.lr=0.001"], config=Path("moe.yaml"))
    with pytest.raises(MoelmError, match="not prepared"):
        evaluate_run("base", "val", "last")
    prepare(load_config("runs/base/config.yaml").data)
    start = loss("base")

    fit("name=tuned")
    first = json.loads(Path("runs/tuned/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(start, rel=0.05)
    assert loss("tuned") < start

    fit()  # in its own directory, where step 0 stays
    kept = [path.name for path in sorted(Path("runs/base/checkpoints").iterdir())]
    assert kept == ["step-00000000", "step-00000002", "step-00000004"]
    assert (loss("base"), loss("base", "0")) == (loss("tuned"), start)
    told = analyze_run("base", Path("routing"), "val", "0", 10_000, 9, 0)
    assert told is not None
    assert told["layers"][0]["load_max_over_mean"] >= 1
    export_run("base", Path("out"))
    card = Path("out/README.md").read_text()
    assert "| weights from | import of hf, model_type mixtral, dtype float32 |" in card
    assert "| trained on | 1,024 tokens" in card


@pytest.mark.usefixtures("here")
def test_a_dense_import_can_be_upcycled() -> None:
    import_model(save(build("llama"), Path("llama")), "dense")
    upcycle_run("dense", "sparse", 4, 2)
    torch.testing.assert_close(logits("sparse"), logits("dense"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_commands_hand_over_to_one_another(moelm: Moelm, workplace: Path) -> None:
    folder = save(build("mixtral"), workplace / "hf")
    assert moelm("import", str(folder), "base", "--config", "moe.yaml", "train.steps=4").returncode == 0
    again = moelm("import", str(folder), "base")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert moelm("sample", "base", "--prompt", "the", "--max-new-tokens", "4", "--temperature", "0").returncode == 0
    done = moelm("train", "runs/base/config.yaml", "name=tuned", "--nproc", "2")
    assert "Starting with the weights of runs/base/checkpoints/step-00000000" in done.stderr, done.stderr
    assert "mixtral" in moelm("export", "tuned", "out").stdout


def test_another_shape_or_tokenizer_cannot_be_started_with(here: Path) -> None:
    fill(Path())
    import_model(here, "base")
    config = load_config("moe.yaml", ["start.run=base", "name=new"])
    with pytest.raises(MoelmError, match="is of another model"):
        train(config, RunDirectory(Path("runs/new")))
    with pytest.raises(MoelmError, match="belong to another tokenizer"):
        train(load_config("moe.yaml", ["start.run=base", "data.tokenizer.kind=char"]), RunDirectory(Path("runs/new")))
    assert not Path("runs/new").exists()


MEASURE = """
import sys, threading, time
from pathlib import Path
import moelm.checkpoint, moelm.model, moelm.interop.importing
from moelm.interop.export import export_run
from moelm.interop.importing import import_model
from moelm.interop.reading import read_settings
from moelm.interop.upcycle import upcycle_run

def held():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssFile"))) / 1024

start, most, done = held(), 0.0, False
def watch():
    global most
    while not done:
        most = max(most, held())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
import_model(Path("hf"), "run", ["data.seq_len=64"])
done = True
watcher.join()
print(most - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_one_shard_above_the_model(tmp_path: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = transformers.AutoConfig.for_model("mixtral", **{**SHAPE, **large})
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    save(model, tmp_path / "hf", max_shard_size="60MB")
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    with contextlib.chdir(tmp_path):
        done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert size > 300
    assert float(done.stdout) < size + 60 + 40  # one shard, and the libraries that are loaded on the way
