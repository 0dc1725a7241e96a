"""Reading a run's YAML: inheritance, overrides, and a sentence for each mistake."""

from pathlib import Path

import pytest

from moelm.config import DenseFFNConfig, check_config, dump_config, load_config
from moelm.errors import MoelmError

MOE = Path(__file__).parents[2] / "configs/demo-moe.yaml"


@pytest.mark.parametrize(
    ("word", "told"),
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
        ("parallel.dp_shard=2", "one process"),
        ("steps", "key.sub=value is expected"),
    ],
)
def test_mistakes_are_sentences(word: str, told: str) -> None:
    with pytest.raises(MoelmError) as caught:
        load_config(MOE, [word])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_kind_drops_the_old_keys_in_any_order() -> None:
    config = load_config(MOE, ["model.ffn.hidden_dim=64", "model.ffn.kind=dense"])
    assert config.model.ffn == DenseFFNConfig(kind="dense", hidden_dim=64)


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert load_config(MOE, ["optim.lr=3e-4"]).optim.lr == 3e-4


def test_a_dumped_config_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(MOE)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_demo_pair_differs_in_its_ffn_alone() -> None:
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


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(MoelmError, match="leads back"):
        load_config(tmp_path / "a.yaml")


def test_missing_sections_are_named() -> None:
    with pytest.raises(MoelmError, match="model is missing"):
        check_config({"name": "x"}, "here")
