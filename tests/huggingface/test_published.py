"""Published models: each is imported and computes what transformers computes, or is refused by the setting's name."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from moelm.errors import MoelmError
from moelm.huggingface.config_json import from_hf_config
from moelm.huggingface.importing import import_model
from moelm.runs.load import load_run
from tests.huggingface.hf_models import random_hf_model, save_hf_model
from tests.huggingface.published import PUBLISHED, REFUSED, shrunk

DOCUMENTATION = Path(__file__).parents[2] / "docs/interop.md"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shrunk_model_has_the_same_logits(name: str, tmp_path: Path) -> None:
    settings = shrunk(PUBLISHED[name])
    model_type = settings.pop("model_type")
    hf_model = random_hf_model(model_type, {**settings, "initializer_range": 0.3}, name)
    with contextlib.chdir(tmp_path):
        import_model(save_hf_model(hf_model, tmp_path / "hf"), "imported", ["data.seq_len=64"])
        model = load_run("imported")[0]
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf_model(tokens).logits
        assert expected.std() > 0.03
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=3e-5 * float(expected.std()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_read_in_their_published_size(name: str) -> None:
    _, model = from_hf_config(PUBLISHED[name], "config.json")
    assert model["dim"] == PUBLISHED[name]["hidden_size"]


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    settings: dict[str, Any]
    settings, named = REFUSED[name]
    with pytest.raises(MoelmError, match=named):
        from_hf_config(settings, "config.json")


def test_the_documentation_lists_the_models() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    missing = [name for name in PUBLISHED if f"`{name}`" not in text]
    missing += [name for name in REFUSED if " " not in name and f"`{name}`" not in text]
    assert missing == []
