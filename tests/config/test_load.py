"""Loading of configs: inheritance, overrides, and one sentence for each error."""

from pathlib import Path

import pytest

from moelm.config import DenseFFNConfig, apply_overrides, check_config, dump_config, format_override, load_config, read_tree
from moelm.errors import MoelmError

TINY = "kind: moe, hidden_dim: 8, num_experts: 4, top_k: 2"
MOE = Path(__file__).parents[1] / "configs/moe.yaml"
SHIPPED = Path(__file__).parents[2] / "configs"


def check_refused(override: str, message: str) -> None:
    """Check that an override is refused with one line that contains a message."""
    with pytest.raises(MoelmError) as caught:
        load_config(MOE, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
        ("parallel.dp_shard=0", "parallel.dp_shard is 0, but it should be greater than 0 or 'auto'"),
        ("model.ffn.router.kind=softmax", "expected one of 'topk', 'noisy_topk'"),
        ("model.ffn.router.normalise=true", "did you mean normalize"),
        ("model.ffn.router.normalize=3", "router.normalize is 3, but it should be true or false"),
        (
            f"model.ffn={{{TINY}, balance: {{bias: 0.1}}, router: {{kind: noisy_topk}}}}",
            "needs router.kind topk or sigmoid, not noisy",
        ),
        ("model.ffn.balance.load=0.1", "noisy_topk or hierarchical, not topk"),
        ("model.ffn.balance={importance: 0.1, scope: sequence}", "which aux alone knows"),
        ("model.ffn.router={kind: hierarchical, groups: 3, group_k: 1}", "does not divide num_experts = 8"),
        ("model.ffn.router={kind: hierarchical, groups: 2, group_k: 3}", "only groups = 2"),
        ("model.ffn.router={kind: hierarchical, groups: 8, group_k: 1}", "at most 1"),
        (f"model.ffn={{{TINY}, router: {{kind: hash}}, balance: {{aux: 1}}}}", "kind hash"),
        (f"model.ffn={{{TINY}, capacity_factor: 1, router: {{kind: expert_choice}}}}", "exactly full"),
        ("model.ffn.shared_gate=true", "shared_experts is 0, so that there is no output to gate"),
        ("model.ffn.first_dense_dim=8", "but first_dense is 0, so that it has no effect"),
        (f"model.ffn={{{TINY}, first_dense: 1, every: 2}}", "only one of them can be given"),
        ("model.ffn.first_dense=4", "so that none of num_layers = 4 is sparse"),
        (
            f"model={{dim: 8, num_layers: 4, num_heads: 2, unique_layers: 2, ffn: {{{TINY}, first_dense: 1}}}}",
            "layers repeat",
        ),
        ("model.rotary_fraction=0.1", "rotary embeddings need an even number above 0"),
        ("model.qk_norm=heads", "model.qk_norm is 'heads', but it should be true or false or 'all_heads'"),
        ("model.rope_scaling={kind: dynamic, factor: 2}", "expected one of 'linear', 'llama3', 'yarn'"),
        ("model.rope_scaling={kind: yarn, factor: 2}", "original_max_seq_len is missing"),
        (
            "model.rope_scaling={kind: yarn, factor: 2, original_max_seq_len: 9, beta_fast: 1, beta_slow: 32}",
            "beta_slow is 32.0, which must be below beta_fast = 1.0",
        ),
        (
            "model.rope_scaling={kind: llama3, original_max_seq_len: 9, factor: 2, "
            "low_freq_factor: 4, high_freq_factor: 4}",
            "which must be below high_freq_factor = 4.0",
        ),
        ("steps", "key.sub=value is expected"),
        ("start={run: other}", "start has been renamed; its name is now init_from"),
        ("train.compile=true", "train.compile has been renamed; its name is now parallel.compile"),
        ("train.recompute=true", "train.recompute has been renamed; its name is now parallel.activation_checkpointing"),
        ("train.precision=fp16", "train.precision is 'fp16', but it should be 'fp32' or 'bf16' or 'auto'"),
    ],
)
def test_an_invalid_setting_is_described_in_one_sentence(override: str, message: str) -> None:
    check_refused(override, message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=nan", "optim.lr is 'nan', but it should be a number"),
        ("optim.lr=.nan", "optim.lr is nan, but it should be a finite number"),
        ("optim.weight_decay=1e400", "should be a finite number"),
        ("optim.eps=1e-60", "optim.eps is 1e-60"),
        ("optim.lr=0", "optim.lr is 0, but it should be greater than 0"),
        ("optim.kind=sgd", "optim.kind is 'sgd', but it should be 'adamw' or 'muon'"),
        ("optim={kind: muon, lr: 0.01, momentum: 1}", "optim.momentum is 1, but it should be less than 1"),
        ("optim={kind: muon, lr: 0.01, newton_schulz_steps: 0}", "optim.newton_schulz_steps is 0"),
        ("optim.momentum=0.9", "optim: momentum belongs to kind: muon, but kind is adamw"),
        ("optim.adamw.lr=0.1", "optim: adamw belongs to kind: muon, but kind is adamw"),
        ("optim.groups.gate.lr=2", "there is no setting optim.groups.gate; optim.groups knows attention, embedding,"),
        ("optim.groups.routers.lr=2", "did you mean router?"),
        ("optim.groups.router.lr=-1", "optim.groups.router.lr is -1, but it should be greater than or equal to 0"),
        ("optim.groups.norm.weight_decay=-1", "optim.groups.norm.weight_decay is -1"),
        ("train.steps=true", "train.steps is True, but it should be a whole number"),
        ("train.steps=010", "train.steps is '010', but it should be a whole number"),
        ("train.steps=1:30", "train.steps is '1:30'"),
        ("train.steps=99999999999999999999", "less than or equal to"),
        ("train.micro_batch_tokens=0", "train.micro_batch_tokens is 0"),
        ("train.micro_batch_tokens=-256", "train.micro_batch_tokens is -256"),
        ("seed=9223372036854775808", "less than 9223372036854775808"),
        ("model.num_layers=1000000000", "less than or equal to 10000"),
        ("model.ffn.every=5", "ffn.every is 5, so that none of num_layers = 4 would be sparse"),
        ("model.ffn.router.kind=[topk]", "model.ffn.router.kind is ['topk']; expected one of"),
        ("parallel.timeout_s=1e300", "less than or equal to 10000000"),
        ("model.qk_norm=yes", "model.qk_norm is 'yes', but it should be true or false"),
        ("model=null", "model is empty (null), but it should be a section of settings"),
        ("model.dim=", "'model.dim=' has no value; model.dim=null stands for the default"),
        ("data.sources=[]", "data.sources is [], but it should be a list with something in it"),
        ("data.sources.²=x", "'²' is not an item of a list of 1"),
        (f"data.sources.{'9' * 5000}=x", "is not an item of a list of 1"),
        ("data.sources=[{path: a #b}]", "is not a YAML value"),
        ("data.sources=[{path: a}] #b", "a # after a space starts a comment in YAML"),
        ("data.dir=''", "'' is not a path"),
        (f"name={'a' * 300}", "at most 200 characters long"),
        (f"name={'a' * 300}", "aaa…"),
        ("name=..", "letters, digits, dots"),
        ("name=null", "name is empty (null), but it should be text"),
        ("wandb.project=a/b", "is no name that W&B takes"),
        ("base=other.yaml", "only a file has a base"),
        (f"train.steps={'1' * 5000}", "too many digits"),
        (f"train.steps={'[' * 1000}", "nested too deeply"),
    ],
)
def test_a_value_at_the_edge_is_described_in_one_sentence(override: str, message: str) -> None:
    check_refused(override, message)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("notes #1.txt", "notes #1.txt"),
        ("#1.txt", "#1.txt"),
        ("[x].txt", "[x].txt"),
        ("my texts [2024]/*.txt", "my texts [2024]/*.txt"),
        ("*.txt", "*.txt"),
        ("&a", "&a"),
        ("!x", "!x"),
        ("%d", "%d"),
        ("@a", "@a"),
        ("`a`", "`a`"),
        ("a: b.txt", "a: b.txt"),
        ("{a}", "{a}"),
        ("- a", "- a"),
        ("-", "-"),
        ("007", "007"),
        ("1e5", "1e5"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("~", str(Path.home())),
        ("~/a.txt", str(Path.home() / "a.txt")),
        ("'a #b'", "a #b"),
        ('"a\\tb"', "a\tb"),
        ("'null'", "null"),
        ("'a", "'a"),
        ("'a' 'b'", "'a' 'b'"),
        ("'a' #b", "'a' #b"),
        (" a ", " a "),
        ("a\nb", "a\nb"),
    ],
)
def test_the_text_of_an_override_is_taken_as_written(tmp_path: Path, text: str, value: str) -> None:
    config = load_config(MOE, [f"data.dir={text}"])
    assert config.data.dir == value
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("value", ["a #b", "é😀", "007", "null", 3, 1e22, [1, "b"], {"a": None, "b": True}, None])
def test_a_formatted_override_gives_its_value(value: object) -> None:
    tree: dict[str, object] = {}
    apply_overrides(tree, [format_override("data.dir" if isinstance(value, str) else "model", value)])
    assert tree == ({"data": {"dir": value}} if isinstance(value, str) else {"model": value})


@pytest.mark.parametrize(
    ("name", "precision"), [("fp32", "fp32"), ("bf16", "bf16"), ("float32", "fp32"), ("bfloat16", "bf16"), ("auto", "auto")]
)
def test_names_of_precisions(name: str, precision: str) -> None:
    assert load_config(MOE, [f"train.precision={name}"]).train.precision == precision


def test_another_optimizer_keeps_the_settings_that_both_have(tmp_path: Path) -> None:
    muon = tmp_path / "muon.yaml"
    optim = "{kind: muon, lr: 0.01, momentum: 0.9, adamw: {lr: 0.003}, groups: {router: {lr: 0.5}}}"
    muon.write_text(f"base: {MOE.resolve()}\noptim: {optim}\n")
    above = tmp_path / "above.yaml"
    above.write_text("base: muon.yaml\noptim: {kind: adamw}\n")
    assert (load_config(muon).optim.momentum, load_config(muon).optim.warmup_steps) == (0.9, 100)
    for config in (load_config(above), load_config(muon, ["optim.kind=adamw"])):
        assert (config.optim.kind, config.optim.lr, config.optim.warmup_steps) == ("adamw", 0.01, 100)
        assert (config.optim.groups.router.lr, config.optim.adamw.lr) == (0.5, None)


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


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["bias=0.001"], {"aux": 0, "z": 0.001, "bias": 0.001}),
        (["bias=0.001", "aux=0.02"], {"aux": 0.02, "z": 0.001, "bias": 0.001}),
        (["bias=0.001", "z=0"], {"aux": 0, "z": 0, "bias": 0.001}),
        (["bias=0"], {"aux": 0.01, "z": 0.001, "bias": 0}),
    ],
)
def test_a_bias_replaces_the_auxiliary_loss_unless_it_is_given(
    tmp_path: Path, overrides: list[str], weights: dict[str, float]
) -> None:
    config = load_config(MOE, [f"model.ffn.balance.{each}" for each in overrides])
    assert {name: getattr(config.model.ffn.balance, name) for name in weights} == weights
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
    sparse, dense = (load_config(SHIPPED / f"demo-{kind}.yaml").model_dump() for kind in ("moe", "dense"))
    for tree in (sparse, dense):
        tree["model"].pop("ffn")
        tree.pop("name")
    assert sparse == dense


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no settings"),
        (b"- 1", "holds no settings"),
        (b"a: [", "is not valid YAML at line 1"),
        (b"base: other.yaml\nname: x", "There is no config file"),
        (b"base: [a]", "base is ['a']"),
        (b"base: .", "cannot be read: Is a directory"),
        (b'base: "a\\0"', "is not the name of a file"),
        ("name: é".encode("latin-1"), "is not text in UTF-8"),
        ("name: a".encode("utf-16"), "is not text in UTF-8"),
        (b"name: a\0", "the character '\\x00' is not allowed"),
        (b"#" * 2**21, "more than 1,048,576 bytes"),
        (b"1: a", "the key 1 is not text"),
        (b"name: a\nmodel.dim: 3", "there is no setting 'model.dim'; in a file, each part of a dotted name is a section"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(MoelmError) as caught:
        load_config(tmp_path / "config.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to("config.yaml")
    with pytest.raises(MoelmError, match="cannot be read: Too many levels of symbolic links"):
        load_config(tmp_path / "config.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbfname: a\r\nseed: 1\r\n")
    assert read_tree(tmp_path / "config.yaml") == {"name": "a", "seed": 1}


@pytest.mark.parametrize(
    ("base", "file", "merged"),
    [
        ("router: {normalize: false}", "router: {kind: topk}", {"router": {"normalize": False, "kind": "topk"}}),
        ("router: {normalize: false}", "router: {kind: sigmoid}", {"router": {"kind": "sigmoid"}}),
        (
            "router: {kind: sigmoid, scale: 2}",
            "router: {normalize: false}",
            {"router": {"kind": "sigmoid", "scale": 2, "normalize": False}},
        ),
        ("tokenizer: {vocab_size: 999}", "tokenizer: {kind: byte}", {"tokenizer": {"kind": "byte"}}),
        ("ffn: {depth: 2}", "ffn: {kind: dense}", {"ffn": {"depth": 2, "kind": "dense"}}),
    ],
)
def test_a_section_is_merged_unless_its_kind_changes(tmp_path: Path, base: str, file: str, merged: object) -> None:
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "config.yaml").write_text(f"base: base.yaml\n{file}")
    assert read_tree(tmp_path / "config.yaml") == merged


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
