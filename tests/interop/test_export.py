"""Runs of ours as Hugging Face's library loads them; what it cannot express is refused before anything is written."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moelm.config import TokenizerConfig, check_config
from moelm.data.tokenizer import Tokenizer, build_tokenizer
from moelm.errors import MoelmError
from moelm.generate import Sampling, generate_text
from moelm.interop.architectures import architecture_for
from moelm.interop.export import export_run
from moelm.interop.importing import import_model
from moelm.model import build_model
from moelm.rundir import RunDirectory, create_run, load_run
from tests.conftest import Moelm
from tests.interop.peers import tensors, transformers

TRUNK: dict[str, Any] = {"dim": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64, "init_std": 0.3}
MOE: dict[str, Any] = {"kind": "moe", "hidden_dim": 12, "num_experts": 4, "top_k": 2}
DENSE: dict[str, Any] = {"kind": "dense", "hidden_dim": 28}
SIGMOID: dict[str, Any] = {"router": {"kind": "sigmoid", "scale": 2.5}}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", MOE, {}),
    "untied-window": ("mixtral", MOE, {"tie_embeddings": False, "window": 9, "rope_theta": 300.0, "head_dim": 6}),
    "noisy": ("mixtral", {**MOE, "router": {"kind": "noisy_topk"}}, {}),
    "capacity": ("mixtral", {**MOE, "capacity_factor": 1.0}, {}),
    "multipliers": ("mixtral", MOE, {"embedding_multiplier": 3.0, "output_multiplier": 0.7, "activation": "gelu"}),
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
    "dense": ("llama", DENSE, {}),
    "dense-multipliers": ("llama", DENSE, {"embedding_multiplier": 3.0, "output_multiplier": 0.7, "tie_embeddings": False}),
    "dense-window": ("mistral", DENSE, {"window": 5}),
    "dense-qk-norm": ("qwen3", DENSE, {"qk_norm": True, "window": 5}),
}
"""What it becomes, its feed-forward blocks, and what is unlike TRUNK."""
TEXT = "the red cat sees the old dog and likes a green stone but the bird sleeps " * 20


def make(kind: str, ffn: dict[str, Any], changes: dict[str, Any]) -> None:
    """A run with random weights, norms and biases too, in the current folder."""
    sort = {"kind": kind, "vocab_size": 290} if kind == "bpe" else {"kind": kind}
    tokenizer = build_tokenizer(TokenizerConfig.model_validate(sort), [TEXT])
    config = check_config(
        {
            "name": "run",
            "model": {**TRUNK, **changes, "ffn": ffn, "vocab_size": tokenizer.vocab_size},
            "data": {"sources": [{"name": "builtin"}], "tokenizer": {"kind": kind}, "seq_len": 64},
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
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export."""
    kind, ffn, changes = MODELS[request.param]
    folder = tmp_path_factory.mktemp("export")
    with contextlib.chdir(folder):
        make("bpe", ffn, changes)
        assert export_run("run", Path("out")) == kind
    return folder


@pytest.fixture
def exported(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


@pytest.mark.usefixtures("exported")
def test_logits_agree() -> None:
    ours, tokenizer, _ = load_run("run")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = torch.tensor(tokenizer.encode_batch([TEXT[:180]])[0][:40])[None]
    with torch.no_grad():
        expected = ours(tokens_BT).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(theirs(tokens_BT).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("exported")
def test_greedy_samples_agree_token_for_token() -> None:
    ours, tokenizer, _ = load_run("run")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    words = transformers.AutoTokenizer.from_pretrained("out")
    prompt = "the red cat sees a"
    given = words(prompt, return_tensors="pt")
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert given["input_ids"][0].tolist() == tokenizer.encode_prompt(prompt)
    written = theirs.generate(**given, max_new_tokens=20, do_sample=False)[0, given["input_ids"].shape[1] :]
    expected = generate_text(ours, tokenizer, [prompt], Sampling(20, temperature=0))[0]
    assert words.decode(written, skip_special_tokens=True) == expected


@pytest.mark.usefixtures("exported")
def test_names_are_those_that_the_library_writes() -> None:
    transformers.AutoModelForCausalLM.from_pretrained("out").save_pretrained("theirs")
    assert tensors(Path("out")).keys() == tensors(Path("theirs")).keys()


@pytest.mark.usefixtures("exported")
def test_it_comes_back() -> None:
    import_model(Path("out"), "back", ["data.seq_len=32"])
    there = load_run("run")[0]
    back, tokenizer, _ = load_run("back")
    assert tokenizer.content == Tokenizer.load(Path("out/tokenizer.json")).content
    tokens_BT = torch.randint(0, 280, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens_BT).logits, there(tokens_BT).logits, rtol=0, atol=1e-5)
    export_run("back", Path("again"))
    first, again = tensors(Path("out")), tensors(Path("again"))
    assert all(torch.equal(first[name], again[name]) for name in first.keys() | again.keys())


@pytest.mark.parametrize(
    ("ffn", "changes", "told"),
    [
        (MOE, {"sandwich_norm": True}, "model.sandwich_norm"),
        ({**MOE, "depth": 2}, {}, "model.ffn.depth is 2"),
        (DENSE, {"num_layers": 2, "unique_layers": 1}, "model.unique_layers is 1"),
        (DENSE, {"attention_logit_cap": 30.0}, "model.attention_logit_cap is 30.0"),
        ({**MOE, "router": {"kind": "hierarchical", "groups": 2, "group_k": 2}}, {}, "router.kind is hierarchical"),
        ({**MOE, "router": {"kind": "hash"}}, {}, "router.kind is hash"),
        ({**MOE, "router": {"kind": "expert_choice"}}, {}, "router.kind is expert_choice"),
        ({**MOE, "shared_experts": 1}, {"qk_norm": True}, "shared_experts is 1 beside model.qk_norm"),
        ({**MOE, **SIGMOID}, {"window": 4}, "model.window is 4 beside"),
        ({**MOE, **SIGMOID, "every": 2}, {}, "model.ffn.every is 2 beside"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ffn: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make("byte", ffn, changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MoelmError, match=told):
        export_run("run", Path("out"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_every_tokenizer_opens_texts_as_moelm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make(kind, DENSE, {})
    export_run("run", Path("out"))
    ours, theirs = Tokenizer.load(Path("runs/run/tokenizer.json")), transformers.AutoTokenizer.from_pretrained("out")
    for text in ("the red  cat", "a"):
        assert theirs(text)["input_ids"] == ours.encode_prompt(text)
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs(["a", "the cat"], padding=True)["attention_mask"][0].count(0) > 0


def test_large_weights_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("bpe", MOE, {})
    export_run("run", Path("whole"))
    export_run("run", Path("cut"), precision="bf16", shard_gb=1e-5)
    files = sorted(Path("cut").glob("*.safetensors"))
    index = json.loads(Path("cut/model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert all(path.stat().st_size < 14_000 for path in files)
    assert index["weight_map"].keys() == tensors(Path("whole")).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(Path("cut")).values())
    for name, tensor in tensors(Path("whole")).items():
        assert torch.equal(tensors(Path("cut"))[name], tensor.bfloat16())
    loaded = transformers.AutoModelForCausalLM.from_pretrained("cut")
    assert loaded.dtype == torch.bfloat16
    import_model(Path("cut"), "back", ["data.seq_len=32"])
    assert load_run("back")[0].embedding.weight.dtype == torch.float32
    export_run("back", Path("again"))
    assert all(torch.equal(tensors(Path("cut"))[name], tensor) for name, tensor in tensors(Path("again")).items())


def test_the_command_tells_and_keeps_what_is_there(moelm: Moelm, trained: Path, tmp_path: Path) -> None:
    run, out = trained / "runs/tiny-moe", tmp_path / "out"
    assert "mixtral" in moelm("export", str(run), str(out), "--checkpoint", "best").stdout
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "4, of which a token visits 2" in card
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]
    assert f"| all | {loss:.4f} |" in card
    assert len({path.stat().st_mode for path in out.iterdir() if path.name != "tokenizer.json"}) == 1
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = moelm("export", str(run), str(out))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists already" in again.stderr
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("kilobytes", [1, 20])
def test_a_disk_that_fills_up_leaves_nothing(kilobytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on the size of a file stands for a full disk: it is met in the tokenizer, or in the weights."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    make("bpe", MOE, {"num_layers": 2})
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, whole[1]))
    try:
        with pytest.raises(MoelmError, match=r"out cannot be written: .*File too large"):
            export_run("run", Path("out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_numbers_too_large_for_a_dtype_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("byte", DENSE, {"embedding_multiplier": 1e6})
    with pytest.raises(MoelmError, match=r"model.embed_tokens.weight reaches .*, too large for torch.float16"):
        export_run("run", Path("out"), precision="float16")
    assert not Path("out").exists()
    export_run("run", Path("out"), precision="bf16", shard_gb=float("inf"))


def test_an_empty_folder_or_a_link_to_one_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("byte", DENSE, {})
    Path("real").mkdir()
    Path("link").symlink_to("real")
    export_run("run", Path("link"))
    assert Path("real/config.json").exists()
    Path("empty").mkdir()
    run = Path("runs/run").resolve()
    monkeypatch.chdir("empty")
    with pytest.raises(MoelmError, match="an empty one that is not the current"):
        export_run(run, Path())


def test_the_card_remembers_where_the_weights_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("byte", DENSE, {})
    export_run("run", Path("out"))
    assert "| weights from | import of a test |" in Path("out/README.md").read_text()


def test_published_configs_find_their_architecture() -> None:
    from moelm.config import load_config

    configs = Path(__file__).parents[2] / "configs"
    assert architecture_for(load_config(configs / "mixtral-8x7b.yaml").model).name == "mixtral"
    assert architecture_for(load_config(configs / "demo-moe.yaml").model).name == "qwen3_moe"
    with pytest.raises(MoelmError, match="sandwich_norm"):
        architecture_for(load_config(configs / "grok1-tiny.yaml").model)
