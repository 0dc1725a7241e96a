"""Which settings without effect are reported."""

from pathlib import Path

import pytest

from moelm.config import describe_ineffective, load_config
from moelm.config.load import dump_config

CONFIGS = Path(__file__).parents[2] / "configs"
MOE = Path(__file__).parents[1] / "configs/moe.yaml"
NOT_TRAINED = ("base", "bench", "gpu")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("optim.warmup_steps=4200", "so the learning rate never reaches its peak: it ends at 0.00133 of 0.004."),
        ("optim.warmup_steps=1400", "optim.warmup_steps is 1,400, all of train.steps"),
        ("optim.decay_fraction=0.5", "only the schedule wsd has it, not cosine"),
        ("optim.schedule=constant optim.min_lr_ratio=0", "the schedule constant does not decay"),
        ("model.window=256", "model.window is 256, not below the longest context of 256"),
        ("model.ffn.capacity_factor=4", "no expert can have more than 4 times the mean load"),
        ("model.ffn.top_k=8 model.ffn.balance.aux=0.5", "model.ffn.balance.aux is 0.5, but each token goes to all experts"),
        (
            "model.ffn.top_k=8 model.ffn.balance.bias=0.5",
            "model.ffn.balance.bias is 0.5, but each token goes to all experts",
        ),
        ("model.ffn.balance.bias=0.1 model.ffn.balance.scope=micro", "no balance loss has a weight"),
        ("model.ffn.router.kind=sigmoid model.ffn.balance.scope=micro", "no balance loss has a weight"),
        ("model.ffn.top_k=1", "model.ffn.router.normalize=false prevents that"),
        ("model.ffn.top_k=1 model.ffn.router.kind=noisy_topk", "the router learns nothing from the loss."),
        ("parallel.reshard_after_forward=false", "parallel.dp_shard is 1, so nothing is sharded"),
        (
            "data.tokenizer.kind=byte data.tokenizer.vocab_size=999",
            "vocab_size is 999, but only the kind bpe has it",
        ),
        ("data.sources.0.weight=2", "the weight of builtin is 2, but there is no other source"),
        ("wandb.project=mine", "wandb.project is mine, but wandb.mode is disabled"),
    ],
)
def test_a_setting_without_effect_is_reported(overrides: str, sentence: str) -> None:
    config = load_config(MOE, overrides.split())
    found = describe_ineffective(config)
    assert len(found) == 1
    assert sentence in found[0]


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "optim.schedule=wsd optim.decay_fraction=0.5",
        "optim.schedule=constant",
        "model.window=255",
        "model.window=256 model.max_seq_len=512",
        "model.ffn.capacity_factor=3.9",
        "model.ffn.balance.bias=0.001",
        "model.ffn.num_experts=1 model.ffn.top_k=1",
        "model.ffn.top_k=1 model.ffn.router.normalize=false",
        "data.tokenizer.kind=byte",
        "parallel.reshard_after_forward=false parallel.dp_shard=2",
        "wandb.project=mine wandb.mode=offline",
    ],
)
def test_a_setting_with_an_effect_is_not_reported(tmp_path: Path, overrides: str) -> None:
    config = load_config(MOE, overrides.split())
    assert describe_ineffective(config) == []
    (tmp_path / "config.yaml").write_text(dump_config(config))  # with every default written out
    assert describe_ineffective(load_config(tmp_path / "config.yaml")) == []


def test_the_shipped_configs_have_no_setting_without_effect() -> None:
    trained = [path for path in CONFIGS.glob("*.yaml") if not any(word in path.stem for word in NOT_TRAINED)]
    assert len(trained) > 5
    assert [(path, found) for path in trained if (found := describe_ineffective(load_config(path)))] == []
