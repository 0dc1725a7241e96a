"""Exported runs loaded by transformers: same logits and samples, and errors that leave nothing behind."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moelm.config import SourceConfig, TokenizerConfig, check_config, load_config
from moelm.data.special_tokens import declared_by_user
from moelm.data.tokenizer import Tokenizer, build_tokenizer
from moelm.errors import MoelmError
from moelm.huggingface.architectures import architecture_for
from moelm.huggingface.export import export_run
from moelm.huggingface.importing import import_model
from moelm.huggingface.model_card import model_card
from moelm.inference.generate import Sampling, generate_text
from moelm.model import build_model
from moelm.runs.directory import RunDirectory
from moelm.runs.load import create_run, load_run
from tests.conftest import Moelm
from tests.huggingface.hf_models import read_tensors, transformers
from tests.tokenizers import SHAPES

MODEL: dict[str, Any] = {"dim": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64, "init_std": 0.3}
MOE: dict[str, Any] = {"kind": "moe", "hidden_dim": 12, "num_experts": 4, "top_k": 2}
DENSE: dict[str, Any] = {"kind": "dense", "hidden_dim": 28}
SIGMOID: dict[str, Any] = {"router": {"kind": "sigmoid", "scale": 2.5}}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", MOE, {}),
    "untied-window": ("mixtral", MOE, {"tie_embeddings": False, "window": 9, "rope_theta": 300.0, "head_dim": 6}),
    "noisy": ("mixtral", {**MOE, "router": {"kind": "noisy_topk"}}, {}),
    "capacity": ("mixtral", {**MOE, "capacity_factor": 1.0}, {}),
    "multipliers": ("mixtral", MOE, {"embedding_multiplier": 3.0, "output_multiplier": 0.7, "activation": "gelu"}),
    "mup": ("mixtral", MOE, {"parametrization": "mup", "base_dim": 8}),
    "unnormalized": ("qwen2_moe", {**MOE, "router": {"kind": "topk", "normalize": False}}, {}),
    "shared": ("qwen2_moe", {**MOE, "shared_experts": 2}, {"window": 7}),
    "every-other": ("qwen2_moe", {**MOE, "every": 2}, {}),
    "qk-norm": (
        "qwen3_moe",
        {**MOE, "every": 2, "router": {"kind": "topk", "normalize": False}},
        {"qk_norm": True, "window": 9},
    ),
    "sigmoid": ("glm4_moe", {**MOE, **SIGMOID}, {"qk_norm": True}),
    "sigmoid-shared": ("glm4_moe", {**MOE, **SIGMOID, "shared_experts": 1}, {"tie_embeddings": False}),
    "shared-gate": ("qwen2_moe", {**MOE, "shared_experts": 1, "shared_gate": True}, {"qkv_bias": True}),
    "sigmoid-published": (
        "glm4_moe",
        {**MOE, **SIGMOID, "first_dense": 1, "first_dense_dim": 20},
        {"qkv_bias": True, "rotary_fraction": 0.5, "head_dim": 8},
    ),
    "qk-norm-all-heads": ("olmoe", MOE, {"qk_norm": "all_heads"}),
    "granitemoe": ("granitemoe", MOE, {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "output_multiplier": 0.7}),
    "granite": ("granite", DENSE, {"attention_multiplier": 0.4, "parametrization": "mup", "base_dim": 8}),
    "biases": ("llama", DENSE, {"qkv_bias": True, "attention_output_bias": True}),
    "moe-biases": ("granitemoe", MOE, {"qkv_bias": True, "attention_output_bias": True}),
    "qk-norm-biases": ("qwen3_moe", MOE, {"qk_norm": True, "qkv_bias": True, "attention_output_bias": True}),
    "dense-bias": ("qwen2", DENSE, {"qkv_bias": True, "window": 9}),
    "dense-llama3": (
        "llama",
        DENSE,
        {
            "rope_scaling": {
                "kind": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_seq_len": 32,
            }
        },
    ),
    "yarn": ("mixtral", MOE, {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}}),
    "dense": ("llama", DENSE, {}),
    "dense-multipliers": ("llama", DENSE, {"embedding_multiplier": 3.0, "output_multiplier": 0.7, "tie_embeddings": False}),
    "dense-window": ("mistral", DENSE, {"window": 5}),
    "dense-qk-norm": ("qwen3", DENSE, {"qk_norm": True, "window": 5}),
}
"""`model_type` of the export, `model.ffn`, and the settings that differ from MODEL."""
TEXT = "the red cat sees the old dog and likes a green stone but the bird sleeps " * 20


def create_random_run(
    tokenizer_kind: str, ffn: dict[str, Any], changes: dict[str, Any], tokenizer: Tokenizer | None = None
) -> None:
    """Create `runs/run` in the current folder; its weights are all random, those of norms and biases included."""
    tokenizer_config: dict[str, Any] = {"kind": tokenizer_kind}
    if tokenizer_kind == "bpe":
        tokenizer_config["vocab_size"] = 290
    tokenizer = tokenizer or build_tokenizer(TokenizerConfig.model_validate(tokenizer_config), [TEXT])
    config = check_config(
        {
            "name": "run",
            "model": {**MODEL, **changes, "ffn": ffn, "vocab_size": tokenizer.vocab_size},
            "data": {"sources": [{"name": "builtin"}], "tokenizer": {"kind": tokenizer_kind}, "seq_len": 64},
            "train": {"steps": 1, "batch_tokens": 64},
            "optim": {"lr": 1e-3},
        },
        "test",
    )
    weights = build_model(config.model, seed=1).state_dict()
    generator = torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        if weight.dim() == 1 or "router" in name:
            weight.uniform_(0.5, 1.5, generator=generator) if weight.dim() == 1 else weight.normal_(generator=generator)
    create_run(RunDirectory.new("run"), config, tokenizer, weights, {"import of": "a test"})


@pytest.fixture(scope="module", params=MODELS)
def exported_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export."""
    model_type, ffn, changes = MODELS[request.param]
    folder = tmp_path_factory.mktemp("export")
    with contextlib.chdir(folder):
        create_random_run("bpe", ffn, changes)
        assert export_run("run", Path("out")) == model_type
    return folder


@pytest.fixture
def exported(exported_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported_folder)


@pytest.mark.usefixtures("exported")
def test_logits_equal() -> None:
    model, tokenizer, _ = load_run("run")
    hf_model, info = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = torch.tensor(tokenizer.encode_batch([TEXT[:180]])[0][:40])[None]
    with torch.no_grad():
        expected = model(tokens_BT).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(hf_model(tokens_BT).logits, expected, rtol=0, atol=4e-5 * float(expected.std()))


@pytest.mark.usefixtures("exported")
def test_greedy_samples_equal() -> None:
    model, tokenizer, _ = load_run("run")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained("out")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    generation_config = hf_model.generation_config
    assert (generation_config.bos_token_id, generation_config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    prompt = "the red cat sees a"
    inputs = hf_tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer.encode_prompt(prompt)
    new_tokens = hf_model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = generate_text(model, tokenizer, [prompt], Sampling(20, temperature=0))[0]
    assert hf_tokenizer.decode(new_tokens, skip_special_tokens=True) == expected


@pytest.mark.usefixtures("exported")
def test_tensor_names_are_those_that_transformers_writes() -> None:
    transformers.AutoModelForCausalLM.from_pretrained("out").save_pretrained("saved")
    assert read_tensors(Path("out")).keys() == read_tensors(Path("saved")).keys()


@pytest.mark.usefixtures("exported")
def test_import_of_an_export_gives_the_model() -> None:
    import_model(Path("out"), "imported", ["data.seq_len=32"])
    model = load_run("run")[0]
    imported, tokenizer, _ = load_run("imported")
    assert tokenizer.content == Tokenizer.load(Path("out/tokenizer.json")).content
    tokens_BT = torch.randint(0, 280, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens_BT).logits
        torch.testing.assert_close(imported(tokens_BT).logits, expected, rtol=0, atol=5e-6 * float(expected.std()))
    export_run("imported", Path("again"))
    first, again = read_tensors(Path("out")), read_tensors(Path("again"))
    assert all(torch.equal(first[name], again[name]) for name in first.keys() | again.keys())


@pytest.mark.parametrize(
    ("ffn", "changes", "message"),
    [
        (MOE, {"sandwich_norm": True}, "model.sandwich_norm"),
        ({**MOE, "depth": 2}, {}, "model.ffn.depth is 2"),
        (DENSE, {"num_layers": 2, "unique_layers": 1}, "model.unique_layers is 1"),
        (DENSE, {"attention_logit_cap": 30.0}, "model.attention_logit_cap is 30.0"),
        ({**MOE, "router": {"kind": "hierarchical", "groups": 2, "group_k": 2}}, {}, "router.kind is hierarchical"),
        ({**MOE, "router": {"kind": "hash"}}, {}, "router.kind is hash"),
        ({**MOE, "router": {"kind": "expert_choice"}}, {}, "router.kind is expert_choice"),
        ({**MOE, "shared_experts": 1}, {"qk_norm": True}, "shared_experts is 1, which qwen3_moe"),
        ({**MOE, "balance": {"bias": 0.01}}, {}, "model.ffn.balance.bias is 0.01 with model.ffn.router.kind = topk"),
        ({**MOE, **SIGMOID}, {"window": 4}, "model.window is 4, which glm4_moe"),
        (DENSE, {"qk_norm": True, "qkv_bias": True}, "model.qkv_bias is True without model.attention_output_bias, which"),
        (DENSE, {"attention_output_bias": True}, "model.attention_output_bias is True without model.qkv_bias, which llama"),
        (DENSE, {"qkv_bias": True, "attention_output_bias": True, "window": 9}, "model.qkv_bias is True, which mistral"),
        (DENSE, {"qk_norm": "all_heads"}, "model.qk_norm is all_heads, which qwen3"),
        (DENSE, {"rotary_fraction": 0.5}, "model.rotary_fraction is 0.5, which llama"),
        (DENSE, {"residual_multiplier": 0.5, "window": 4}, "model.window is 4, which granite"),
        ({**MOE, "shared_experts": 1}, {"attention_multiplier": 0.5}, "shared_experts is 1, which granitemoe"),
        ({**MOE, "first_dense": 1}, {}, "model.ffn.first_dense is 1, which mixtral"),
        ({**MOE, **SIGMOID, "shared_experts": 1, "shared_gate": True}, {}, "shared_gate is True, which glm4_moe"),
        ({**MOE, **SIGMOID, "every": 2}, {}, "model.ffn.every is 2, which glm4_moe"),
    ],
)
def test_inexpressible_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ffn: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("byte", ffn, changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MoelmError, match=message):
        export_run("run", Path("out"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_exported_tokenizers_encode_as_moelm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run(kind, DENSE, {})
    export_run("run", Path("out"))
    tokenizer = Tokenizer.load(Path("runs/run/tokenizer.json"))
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    for text in ("the red  cat", "a"):
        assert hf_tokenizer(text)["input_ids"] == tokenizer.encode_prompt(text)
        assert hf_tokenizer.decode(hf_tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert hf_tokenizer(["a", "the cat"], padding=True)["attention_mask"][0].count(0) > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_tokenizers_of_others_are_exported_with_all_end_tokens(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = SHAPES[shape]()
    last = raw.get_vocab_size() - 1
    tokenizer = Tokenizer(raw, [declared_by_user(None, [raw.token_to_id("</s>"), last])])
    create_random_run("byte", DENSE, {"vocab_size": tokenizer.vocab_size}, tokenizer)
    export_run("run", Path("out"))
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    for text in ("the red  cat, 日本", "a", "the ☃ cat"):
        assert hf_tokenizer(text)["input_ids"] == tokenizer.encode_prompt(text)
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for name in ("config.json", "generation_config.json"):
        assert json.loads(Path("out", name).read_text())["eos_token_id"] == [tokenizer.eos_id, last]
    import_model(Path("out"), "again", ["data.seq_len=32"])
    assert load_run("again")[1].eos_ids == tokenizer.eos_ids


def test_large_weights_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("bpe", MOE, {})
    export_run("run", Path("single"))
    export_run("run", Path("sharded"), dtype="bf16", shard_gb=1e-5)
    files = sorted(Path("sharded").glob("*.safetensors"))
    index = json.loads(Path("sharded/model.safetensors.index.json").read_text())
    single, sharded = read_tensors(Path("single")), read_tensors(Path("sharded"))
    assert len(files) > 3
    assert all(path.stat().st_size < 14_000 for path in files)
    assert index["weight_map"].keys() == single.keys() == sharded.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in sharded.values())
    for name, tensor in single.items():
        assert torch.equal(sharded[name], tensor.bfloat16())
    loaded = transformers.AutoModelForCausalLM.from_pretrained("sharded")
    assert loaded.dtype == torch.bfloat16
    import_model(Path("sharded"), "imported", ["data.seq_len=32"])
    assert load_run("imported")[0].embedding.weight.dtype == torch.float32
    export_run("imported", Path("again"))
    assert all(torch.equal(sharded[name], tensor) for name, tensor in read_tensors(Path("again")).items())


def test_the_command_prints_the_architecture_and_keeps_an_existing_export(
    moelm: Moelm, trained: Path, tmp_path: Path
) -> None:
    run, out = trained / "runs/tiny-moe", tmp_path / "out"
    assert "mixtral" in moelm("export", str(run), str(out), "--checkpoint", "best").stdout
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| experts | 4, 2 active for a token |" in card
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]
    assert f"| all | {loss:.4f} |" in card
    assert len({path.stat().st_mode for path in out.iterdir() if path.name != "tokenizer.json"}) == 1
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = moelm("export", str(run), str(out))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists already" in again.stderr
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("kilobytes", [1, 20])
def test_a_full_disk_leaves_nothing(kilobytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on file sizes simulates a full disk: the tokenizer or the weights exceed it."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    create_random_run("bpe", MOE, {"num_layers": 2})
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, old_limits[1]))
    try:
        with pytest.raises(MoelmError, match=r"out cannot be written: .*File too large"):
            export_run("run", Path("out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_weights_too_large_for_a_dtype_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("byte", DENSE, {"embedding_multiplier": 1e6})
    with pytest.raises(MoelmError, match=r"model.embed_tokens.weight reaches .*, too large for torch.float16"):
        export_run("run", Path("out"), dtype="float16")
    assert not Path("out").exists()
    export_run("run", Path("out"), dtype="bf16", shard_gb=float("inf"))


def test_an_empty_directory_or_a_link_to_one_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("byte", DENSE, {})
    Path("real").mkdir()
    Path("link").symlink_to("real")
    export_run("run", Path("link"))
    assert Path("real/config.json").exists()
    Path("empty").mkdir()
    run = Path("runs/run").resolve()
    monkeypatch.chdir("empty")
    with pytest.raises(MoelmError, match="an empty one other than the current"):
        export_run(run, Path())


def test_the_model_card_has_the_origin_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("byte", DENSE, {})
    export_run("run", Path("out"))
    assert "| weights from | import of a test |" in Path("out/README.md").read_text()


def test_names_do_not_break_the_tables_of_the_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("byte", DENSE, {})
    run, config = RunDirectory.find("run"), load_run("run")[2]
    sources = [SourceConfig(path="a.txt", domain="a|b\nc")]
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
    progress = {"step": 1, "tokens": 8, "flops": 8, "time_s": 1.0}
    scores = {"val/loss": 2.0, "val/bpb": 1.0, "val/domains": {"a|b\nc": {"loss": 2.0, "bpb": 1.0}}}
    run.metrics.write_text(json.dumps(progress | scores) + "\n")
    card = model_card(run, config, progress, architecture_for(config.model), "float32")
    assert r"| trained on | 8 tokens (a\|b\nc) in 1 steps |" in card
    assert r"| a\|b\nc | 2.0000 | 1.0000 |" in card


def test_architectures_of_published_configs() -> None:
    configs = Path(__file__).parents[2] / "configs"
    assert architecture_for(load_config(configs / "mixtral-8x7b.yaml").model).model_type == "mixtral"
    assert architecture_for(load_config(configs / "demo-moe.yaml").model).model_type == "qwen3_moe"
    with pytest.raises(MoelmError, match="sandwich_norm"):
        architecture_for(load_config(configs / "grok1-tiny.yaml").model)
