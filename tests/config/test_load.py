"""Loading of configs: inheritance, overrides, and one sentence for each error."""

from pathlib import Path

import pytest

from moelm.config import DenseFFNConfig, check_config, dump_config, load_config
from moelm.errors import MoelmError

TINY = "kind: moe, hidden_dim: 8, num_experts: 4, top_k: 2"
MOE = Path(__file__).parents[2] / "configs/demo-moe.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.ffn.num_expert=4", "did you mean num_experts"),
        ("trian.steps=3", "did you mean train"),
        ("data.sources.0.pth=x", "did you mean path"),
        ("train.steps=many", "train.steps is 'many'"),
        ("train.steps=2.0", "train.steps is 2.0"),
        ("model.dim=130", "num_heads = 4 does not divide"),
        ("model.ffn.top_k=9", "top_k must be at most 8"),
        ("model.ffn.kind=sparse", "expected one of 'dense', 'moe'"),
        ("model.ffn.kind=dense", "model.ffn.hidden_dim is missing"),
        ("data.tokenizer.vocab_size=100", "at least 258"),
        ("data.sources.3.path=x", "not an item of a list of 1"),
        ("train.batch_tokens=1000", "multiple of data.seq_len"),
        ("train.micro_batch_tokens=few", "a whole number or 'auto'"),
        ("name=a b", "letters, digits, dots"),
        ("model.ffn.balance=5", "a section of settings"),
        ("parallel.dp_shard=0", "dp_shard is 0; at least 1, or auto, is expected"),
        ("model.ffn.router.kind=softmax", "expected one of 'topk', 'noisy_topk'"),
        ("model.ffn.router.normalise=true", "did you mean normalize"),
        ("model.ffn.router.normalize=3", "router.normalize is 3, but it should be true or false"),
        ("model.ffn.balance.bias=0.001", "loss-free balancing needs router.kind sigmoid, not topk"),
        ("model.ffn.balance.load=0.1", "noisy_topk or hierarchical, not topk"),
        ("model.ffn.balance={importance: 0.1, scope: sequence}", "which aux alone knows"),
        ("model.ffn.router={kind: hierarchical, groups: 3, group_k: 1}", "does not divide num_experts = 8"),
        ("model.ffn.router={kind: hierarchical, groups: 2, group_k: 3}", "only groups = 2"),
        ("model.ffn.router={kind: hierarchical, groups: 8, group_k: 1}", "at most 1"),
        (f"model.ffn={{{TINY}, router: {{kind: hash}}, balance: {{aux: 1}}}}", "kind hash"),
        (f"model.ffn={{{TINY}, capacity_factor: 1, router: {{kind: expert_choice}}}}", "exactly full"),
        ("steps", "key.sub=value is expected"),
        ("start={run: other}", "start has been renamed; its name is now init_from"),
        ("train.compile=true", "train.compile has been renamed; its name is now parallel.compile"),
        ("train.recompute=true", "train.recompute has been renamed; its name is now parallel.activation_checkpointing"),
        ("train.precision=fp16", "train.precision is 'fp16', but it should be 'fp32' or 'bf16' or 'auto'"),
    ],
)
def test_an_invalid_setting_is_described_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(MoelmError) as caught:
        load_config(MOE, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "precision"), [("fp32", "fp32"), ("bf16", "bf16"), ("float32", "fp32"), ("bfloat16", "bf16"), ("auto", "auto")]
)
def test_names_of_precisions(name: str, precision: str) -> None:
    assert load_config(MOE, [f"train.precision={name}"]).train.precision == precision


def test_a_new_kind_drops_the_keys_of_the_old_one_in_any_order() -> None:
    config = load_config(MOE, ["model.ffn.hidden_dim=64", "model.ffn.kind=dense"])
    assert config.model.ffn == DenseFFNConfig(kind="dense", hidden_dim=64)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("topk", {"aux": 0.01, "z": 0.001}),
        ("noisy_topk", {"importance": 0.1, "load": 0.1}),
        ("sigmoid", {"bias": 0.001}),
        ("random", {}),
    ],
)
def test_default_balance_losses_depend_on_the_router(tmp_path: Path, kind: str, weights: dict[str, float]) -> None:
    config = load_config(MOE, [f"model.ffn.router.kind={kind}"])
    balance = config.model.ffn.balance.model_dump(exclude={"scope"})
    assert {name: value for name, value in balance.items() if value} == weights
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_an_override_of_one_weight_does_not_change_the_others() -> None:
    config = load_config(MOE, ["model.ffn.balance.aux=0.1"])
    assert (config.model.ffn.balance.aux, config.model.ffn.balance.z) == (0.1, 0.001)


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert load_config(MOE, ["optim.lr=3e-4"]).optim.lr == 3e-4


def test_a_dumped_config_loads_as_an_equal_config(tmp_path: Path) -> None:
    config = load_config(MOE)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_demo_configs_differ_only_in_the_ffn() -> None:
    sparse, dense = (load_config(MOE.with_name(f"demo-{kind}.yaml")).model_dump() for kind in ("moe", "dense"))
    for tree in (sparse, dense):
        tree["model"].pop("ffn")
        tree.pop("name")
    assert sparse == dense


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "base: other.yaml\nname: x"])
def test_unusable_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(MoelmError):
        load_config(tmp_path / "config.yaml")


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\noptim:\n  lr: 0.1\n  lr: 0.2\n")
    with pytest.raises(MoelmError, match=r"twice\.yaml is not valid YAML at line 3: the key lr appears twice"):
        load_config(path)


def test_a_circular_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(MoelmError, match="leads back"):
        load_config(tmp_path / "a.yaml")


def test_missing_sections_are_named() -> None:
    with pytest.raises(MoelmError, match="model is missing"):
        check_config({"name": "x"}, "config.yaml")
