"""Imports: accepted formats, and errors that name the file, setting or tensor and leave nothing behind."""

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

from moelm.analyze.report import analyze_run
from moelm.config import load_config
from moelm.data.prepare import prepare
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.evaluation.losses import evaluate
from moelm.huggingface.config_json import from_hf_config
from moelm.huggingface.export import export_run
from moelm.huggingface.importing import import_model
from moelm.runs.directory import RunDirectory
from moelm.runs.load import load_run, open_run
from moelm.train.setup import train
from moelm.upcycle import upcycle_run
from tests.conftest import Moelm, fill
from tests.huggingface.hf_models import CASES, SHAPE, build_hf_model, save_hf_model, transformers
from tests.huggingface.peak_memory import peak_memory

Tensors = dict[str, Tensor]


@pytest.fixture
def hf_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `hf` with a small Mixtral model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return save_hf_model(build_hf_model("mixtral-tied-window"), tmp_path / "hf")


def logits(run: str) -> Tensor:
    with torch.no_grad():
        return load_run(run)[0](torch.arange(40)[None]).logits


@pytest.mark.parametrize("options", [{"save_original_format": False}, {"max_shard_size": "20KB"}])
def test_fused_experts_and_shards_give_the_same_model(hf_dir: Path, options: dict[str, Any]) -> None:
    save_hf_model(transformers.AutoModelForCausalLM.from_pretrained(hf_dir), Path("other"), **options)
    if "max_shard_size" in options:
        assert len(list(Path("other").glob("*.safetensors"))) > 2
    else:
        assert any("gate_up_proj" in name for name in load_file("other/model.safetensors"))
    import_model(hf_dir, "one")
    import_model(Path("other"), "two")
    assert torch.equal(logits("one"), logits("two"))


def test_settings_and_tensors_of_older_files(hf_dir: Path) -> None:
    settings = json.loads((hf_dir / "config.json").read_text())
    theta = settings.pop("rope_parameters")["rope_theta"]
    (hf_dir / "config.json").write_text(json.dumps({**settings, "rope_theta": theta, "rope_scaling": None}))
    weights = load_file(hf_dir / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, hf_dir / "model.safetensors")
    import_model(hf_dir, "old")
    assert load_config("runs/old/config.yaml").model.rope_theta == theta


def add_and_remove(weights: Tensors) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(24)
    del weights["model.norm.weight"]


def reshape(weights: Tensors) -> None:
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.ones(5, 24)


def untie(weights: Tensors) -> None:
    weights["lm_head.weight"] = torch.ones(263, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            add_and_remove,
            "unknown to the model: model.layers.0.self_attn.q_proj.bias; missing from the files: model.norm.weight",
        ),
        (reshape, r"of another shape: model.layers.1.self_attn.k_proj.weight \(5x24; 12x24 expected\)"),
        (untie, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_match_are_named(hf_dir: Path, change: Callable[[Tensors], None], message: str) -> None:
    weights = load_file(hf_dir / "model.safetensors")
    change(weights)
    save_file(weights, hf_dir / "model.safetensors")
    with pytest.raises(MoelmError, match=message):
        import_model(hf_dir, "run")
    assert sorted(path.name for path in Path().iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; one of llama"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_theta": 1e4, "rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 0.7}},
            "mscale of the rotary",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}}, "rope_type is .* text is expected"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "rope_theta": 1e4}}, "full_attention has rotary"),
        ({"rope_theta": 1.0, "rope_parameters": None}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; a mixtral has 1.0"),
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
def test_unsupported_settings_are_named(hf_dir: Path, changes: dict[str, Any], message: str) -> None:
    settings = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(MoelmError, match=message):
        import_model(hf_dir, "run")
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_missing_setting_is_refused_or_gets_the_default_of_transformers(case: str) -> None:
    model_type = CASES[case][0]
    complete = json.loads(build_hf_model(case).config.to_json_string(use_diff=False))
    keys = {"rms_norm_eps", "norm_topk_prob", "rope_parameters", "sliding_window", "tie_word_embeddings"}
    for key in keys & complete.keys():
        partial = {name: value for name, value in complete.items() if name != key}
        settings = {name: value for name, value in partial.items() if name != "model_type"}
        default = getattr(transformers.AutoConfig.for_model(model_type, **settings), key)
        with contextlib.suppress(MoelmError):
            model = from_hf_config(partial, "config.json")
            assert model == from_hf_config({**partial, key: default}, "config.json"), key


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
def test_windows_set_by_layer(settings: dict[str, Any], window: int | None) -> None:
    base = {**SHAPE, "model_type": "qwen3", "head_dim": 6, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    assert from_hf_config({**base, **settings}, "config.json")[1]["window"] == window
    short = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]}
    with pytest.raises(MoelmError, match="layer_types has 1 entries, but there are 2 layers"):
        from_hf_config({**base, **short}, "config.json")
    mixed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(MoelmError, match="some layers have a sliding window and some do not"):
        from_hf_config({**base, **mixed}, "config.json")


@pytest.mark.parametrize(
    "override", ["name=x", "init_from.run=x", "model.dim=8", "data.tokenizer.kind=bpe", "model.ffn.router.kind=hash"]
)
def test_overrides_of_the_model_are_refused(hf_dir: Path, override: str) -> None:
    with pytest.raises(MoelmError, match="cannot be chosen, because the weights determine it"):
        import_model(hf_dir, "run", [override])


def rename_special_tokens(hf_dir: Path) -> None:
    text = (hf_dir / "tokenizer.json").read_text().replace("<|bos|>", "[S]").replace("<|eos|>", "[E]")
    (hf_dir / "tokenizer.json").write_text(text)


def write_settings(hf_dir: Path, files: dict[str, dict[str, Any]]) -> None:
    """Change keys of JSON files; those that do not exist are created."""
    for name, changes in files.items():
        path = hf_dir / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}))


NONE = {"bos_token_id": None, "eos_token_id": None}
NO_IDS = {"config.json": NONE, "generation_config.json": NONE}


@pytest.mark.parametrize(
    ("files", "overrides", "expected"),
    [
        ({}, [], (0, (1,))),
        ({"config.json": {"eos_token_id": [1, 7]}}, [], (0, (1, 7))),
        ({"config.json": {"eos_token_id": []}, "generation_config.json": {"eos_token_id": [1, 9]}}, [], (0, (1, 9))),
        ({"generation_config.json": {"bos_token_id": 0, "eos_token_id": [7, 1]}}, [], (0, (1, 7))),
        (
            {**NO_IDS, "tokenizer_config.json": {"bos_token": "[S]", "eos_token": {"content": "[E]"}}},
            [],
            (0, (1,)),
        ),
        (
            {
                **NO_IDS,
                "config.json": {**NONE, "vocab_size": 259},
                "tokenizer_config.json": {
                    "bos_token": None,
                    "eos_token": "<|im_end|>",
                    "added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True}},
                },
            },
            [],
            (258, (258,)),
        ),
        (NO_IDS, ["data.tokenizer.bos=0", "data.tokenizer.eos=['[E]', 7]"], (0, (1, 7))),
        ({"config.json": {"eos_token_id": [1, 7]}}, ["data.tokenizer.eos=7"], (0, (7,))),
        ({"config.json": {"eos_token_id": [9999, 1]}}, [], (0, (1,))),
    ],
)
def test_start_and_end_tokens_are_those_of_the_files_or_of_the_user(
    hf_dir: Path, files: dict[str, dict[str, Any]], overrides: list[str], expected: tuple[int, tuple[int, ...]]
) -> None:
    rename_special_tokens(hf_dir)
    write_settings(hf_dir, files)
    if "vocab_size" in files.get("config.json", {}):
        resize_embedding(hf_dir, 259)
    import_model(hf_dir, "run", overrides)
    tokenizer = load_run("run")[1]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == expected
    export_run("run", Path("out"))
    for name in ("config.json", "generation_config.json"):
        eos = json.loads(Path("out", name).read_text())["eos_token_id"]
        assert eos == (list(expected[1]) if len(expected[1]) > 1 else expected[1][0])
    import_model(Path("out"), "again")
    tokenizer = load_run("again")[1]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == expected
    config = load_config("runs/run/config.yaml").data.tokenizer
    prepared = Tokenizer.load(Path(config.path or ""), config.bos, config.eos)
    assert (prepared.eos_ids, prepared.content) == (expected[1], load_run("run")[1].content)


def resize_embedding(hf_dir: Path, vocab_size: int) -> None:
    weights = load_file(hf_dir / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:vocab_size].clone()
    save_file(weights, hf_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        (
            NO_IDS,
            [],
            r"<\|bos\|>, <\|eos\|> would be new to the model; name its own with data.tokenizer.bos",
        ),
        ({**NO_IDS, "config.json": {"bos_token_id": 0, "eos_token_id": None}}, [], r"<\|eos\|> would be new to the model"),
        ({**NO_IDS, "config.json": {"bos_token_id": 0, "eos_token_id": 9999}}, [], r"<\|eos\|> would be new to the model"),
        (
            {"config.json": {"eos_token_id": 1.5}},
            [],
            "config.json: eos_token_id is 1.5; an id or a list of ids is expected",
        ),
        ({}, ["data.tokenizer.eos=</s>"], "data.tokenizer.eos is '</s>', which is not a token of the tokenizer"),
        ({}, ["data.tokenizer.bos=-1"], "bos is -1; the text of a token or an id from 0 is expected"),
        ({}, ["data.tokenizer.eos=[]"], r"eos is \[\]; the text of a token"),
    ],
)
def test_unknown_start_and_end_tokens_are_refused(
    hf_dir: Path, files: dict[str, dict[str, Any]], overrides: list[str], message: str
) -> None:
    rename_special_tokens(hf_dir)
    write_settings(hf_dir, files)
    with pytest.raises(MoelmError, match=message):
        import_model(hf_dir, "run", overrides)
    assert not Path("runs").exists()


def test_contradictions_and_ordinary_end_tokens_are_told(hf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_settings(hf_dir, {"config.json": {"eos_token_id": [7]}, "generation_config.json": {"eos_token_id": 1}})
    import_model(hf_dir, "run")
    output = capsys.readouterr().err
    assert re.search("The end token is 7 in .*/config.json, but 1 in .*/generation_config.json", output)
    assert "(7) starts or ends texts, but is ordinary text too" in output
    assert (load_run("run")[1].eos_id, load_run("run")[1].eos_ids) == (1, (7, 1))


def test_an_index_must_match_the_files(hf_dir: Path) -> None:
    save_hf_model(transformers.AutoModelForCausalLM.from_pretrained(hf_dir), Path("sharded"), max_shard_size="20KB")
    path = Path("sharded/model.safetensors.index.json")
    index = json.loads(path.read_text())
    files = list(index["weight_map"].values())
    name, file = next((name, file) for name, file in index["weight_map"].items() if files.count(file) > 1)
    other = next(each for each in files if each != file)
    for weight_map, message in (
        ({**index["weight_map"], name: other}, f"has {name} in sharded/{other}, but it is in sharded/{file}"),
        ({**index["weight_map"], "more": file}, f"has more in sharded/{file}, but it is in None"),
        ([], "has no weight_map"),
        ({"a": 1}, "has no weight_map"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(MoelmError, match=re.escape(message)):
            import_model(Path("sharded"), "run")
    path.write_text(json.dumps(index))
    save_file({**load_file(f"sharded/{other}"), name: torch.ones(1)}, f"sharded/{other}")
    with pytest.raises(MoelmError, match=f"{name} is in .* and in "):
        import_model(Path("sharded"), "run")


def test_integer_weights_are_refused(hf_dir: Path) -> None:
    weights = load_file(hf_dir / "model.safetensors")
    save_file({name: weight.int() for name, weight in weights.items()}, hf_dir / "model.safetensors")
    with pytest.raises(MoelmError, match=r"is torch.int32; floating-point weights are expected"):
        import_model(hf_dir, "run")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "There is no hf/config.json"),
        ("config.json", "{", "cannot be read as JSON"),
        ("tokenizer.json", None, "--tokenizer"),
        ("tokenizer.json", "[]", "not a tokenizer.json"),
        ("model.safetensors", None, "There is no hf/model.safetensors"),
        ("model.safetensors", "nonsense", "cannot be read as safetensors"),
    ],
)
def test_missing_and_malformed_files_are_named(hf_dir: Path, name: str, content: str | None, message: str) -> None:
    (hf_dir / name).unlink()
    if content is not None:
        (hf_dir / name).write_text(content)
    with pytest.raises(MoelmError, match=message):
        import_model(Path("hf"), "run")
    assert not Path("runs").exists()


def test_a_bias_that_the_files_lack_is_zero_at_first(hf_dir: Path) -> None:
    import_model(hf_dir, "plain")
    import_model(hf_dir, "balanced", ["model.ffn.balance.bias=0.001"])
    assert torch.equal(logits("balanced"), logits("plain"))
    assert load_run("balanced")[0].layers[0].ffn.router.bias.tolist() == [0.0] * 3


def test_overrides_apply_and_an_existing_run_is_kept(hf_dir: Path) -> None:
    run = import_model(hf_dir, "run", ["data.seq_len=32", "model.ffn.balance.aux=0.5"])
    config = load_config(run.config)
    assert (config.data.seq_len, config.model.ffn.balance.aux) == (32, 0.5)  # type: ignore[union-attr]
    with pytest.raises(MoelmError, match="exists already"):
        import_model(hf_dir, "run")


def test_a_full_disk_leaves_nothing(hf_dir: Path) -> None:
    """A limit on file sizes simulates a full disk."""
    resource = pytest.importorskip("resource")
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old_limits[1]))
    try:
        with pytest.raises(MoelmError, match="The run runs/run cannot be written"):
            import_model(hf_dir, "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    assert list(Path("runs").iterdir()) == []


def test_an_import_removes_what_a_killed_one_left(hf_dir: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getppid()):
        Path(f"runs/.old.writing-{platform.node()}-{process}").mkdir(parents=True)
        Path(f"runs/.old.writing-elsewhere-{process}").mkdir()
    import_model(hf_dir, "run")
    remaining = {f".old.writing-elsewhere-{ended.pid}", f".old.writing-elsewhere-{os.getppid()}"}
    remaining.add(f".old.writing-{platform.node()}-{os.getppid()}")
    assert {path.name for path in Path("runs").iterdir()} == {*remaining, "run"}


def test_an_imported_run_is_evaluated_and_trained(hf_dir: Path) -> None:
    def train_base(*overrides: str) -> None:
        config = load_config("runs/base/config.yaml", overrides)
        train(config, RunDirectory(Path("runs") / config.name))

    def loss(run: str, checkpoint: str = "last") -> float:
        opened = open_run(run, checkpoint, "val")
        return evaluate(opened.model, opened.rows, opened.dtype).overall.loss

    fill(Path())
    import_model(hf_dir, "base", ["train.steps=4", "optim.lr=0.001"], config=Path("moe.yaml"))
    with pytest.raises(MoelmError, match="not prepared"):
        loss("base")
    prepare(load_config("runs/base/config.yaml").data)
    imported_loss = loss("base")

    train_base("name=tuned")
    first = json.loads(Path("runs/tuned/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(imported_loss, rel=0.01)
    assert loss("tuned") < imported_loss

    train_base()  # in its own directory, where step 0 stays
    steps = [path.name for path in sorted(Path("runs/base/checkpoints").iterdir())]
    assert steps == ["step-00000000", "step-00000002", "step-00000004"]
    assert (loss("base"), loss("base", "0")) == (loss("tuned"), imported_loss)
    analysis = analyze_run("base", Path("routing"), "val", "0", 10_000, 9, 0)
    assert analysis is not None
    assert analysis["layers"][0]["load_max_over_mean"] >= 1
    export_run("base", Path("out"))
    card = Path("out/README.md").read_text()
    assert "| weights from | import of hf, model_type mixtral, dtype float32 |" in card
    assert "| trained on | 1,024 tokens" in card


@pytest.mark.usefixtures("hf_dir")
def test_a_dense_import_can_be_upcycled() -> None:
    import_model(save_hf_model(build_hf_model("llama"), Path("llama")), "dense")
    upcycle_run("dense", "sparse", 4, 2)
    expected = logits("dense")
    torch.testing.assert_close(logits("sparse"), expected, rtol=0, atol=1e-5 * float(expected.std()))


@pytest.mark.slow
def test_import_sample_train_and_export_by_command(moelm: Moelm, workplace: Path) -> None:
    folder = save_hf_model(build_hf_model("mixtral"), workplace / "hf")
    assert moelm("import", str(folder), "base", "--config", "moe.yaml", "train.steps=4").returncode == 0
    again = moelm("import", str(folder), "base")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert moelm("sample", "base", "--prompt", "the", "--max-new-tokens", "4", "--temperature", "0").returncode == 0
    done = moelm("train", "runs/base/config.yaml", "name=tuned", "--nproc", "2")
    assert "Initial weights: runs/base/checkpoints/step-00000000" in done.stderr, done.stderr
    assert "mixtral" in moelm("export", "tuned", "out").stdout


def test_init_from_refuses_another_shape_or_tokenizer(hf_dir: Path) -> None:
    fill(Path())
    import_model(hf_dir, "base")
    config = load_config("moe.yaml", ["init_from.run=base", "name=new"])
    with pytest.raises(MoelmError, match="belongs to another model"):
        train(config, RunDirectory(Path("runs/new")))
    with pytest.raises(MoelmError, match="belong to another tokenizer"):
        train(load_config("moe.yaml", ["init_from.run=base", "data.tokenizer.kind=char"]), RunDirectory(Path("runs/new")))
    assert not Path("runs/new").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_model_and_one_file(tmp_path: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = transformers.AutoConfig.for_model("mixtral", **{**SHAPE, **large})
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    save_hf_model(model, tmp_path / "hf", max_shard_size="60MB")
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    with contextlib.chdir(tmp_path):
        peak = peak_memory(
            "import moelm.runs.checkpoint, moelm.model\nfrom moelm.huggingface.importing import import_model",
            'import_model(Path("hf"), "run", ["data.seq_len=64"])',
        )
    assert size > 300
    assert peak < size + 60 + 40  # one file, and the libraries that are loaded meanwhile
