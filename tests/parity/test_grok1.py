"""Grok-1 as a combination of the model's options, against logits of the released definition."""

from pathlib import Path

import pytest
import torch

from moelm.config import load_config
from moelm.model import KVCache, build_model, count_parameters
from tests.parity.grok1 import load_grok1_reference
from tests.tolerance import assert_close

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests/data/grok1_tiny.npz"


def test_logits_agree() -> None:
    model, tokens, logits = load_grok1_reference(REFERENCE)
    with torch.no_grad():
        assert_close(model(tokens).logits, logits)


def test_logits_with_a_cache_agree() -> None:
    model, tokens, logits = load_grok1_reference(REFERENCE)
    cache = KVCache(model.config, *tokens.shape, tokens.device)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split((13, 1, 6), dim=1)]
    assert_close(torch.cat(parts, dim=1), logits)


OPTIONS = {
    "sandwich_norm": False,
    "activation": "silu",
    "attention_logit_cap": None,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_matters(option: str) -> None:
    model, tokens, logits = load_grok1_reference(REFERENCE)
    other = build_model(model.config.model_copy(update={option: OPTIONS[option]}), seed=0).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_close(other(tokens).logits, logits)


def test_grok1_has_its_published_size() -> None:
    count = count_parameters(load_config(ROOT / "configs/grok1.yaml").model)
    assert abs(count.total / 314e9 - 1) < 0.01
    assert 0.2 < count.active / count.total < 0.3


def test_the_tiny_config_has_all_options_of_the_large_one() -> None:
    large, tiny = (load_config(ROOT / f"configs/{name}.yaml").model for name in ("grok1", "grok1-tiny"))
    for option in ("sandwich_norm", "activation", "attention_logit_cap", "output_multiplier"):
        assert getattr(tiny, option) == getattr(large, option)
    assert tiny.ffn.router == large.ffn.router
    for config in (large, tiny):
        assert config.embedding_multiplier == pytest.approx(config.dim**0.5)
