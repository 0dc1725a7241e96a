"""The maximal update parametrization: which weights and rates depend on the width, and how."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import ModelConfig, OptimConfig
from moelm.model import Transformer, build_model
from moelm.model.roles import parameter_roles
from moelm.train.parameter_groups import build_groups

MOE = {"kind": "moe", "hidden_dim": 64, "num_experts": 4, "top_k": 2}
BASE = 32
SCRIPT = Path(__file__).parents[2] / "scripts/coordinate_check.py"


def model(dim: int, **changes: Any) -> Transformer:
    """A mixture with heads of 16."""
    shape = {"dim": dim, "num_layers": 2, "num_heads": dim // 16, "vocab_size": 500, "init_std": 0.1, "ffn": MOE}
    return build_model(ModelConfig.model_validate({**shape, "parametrization": "mup", "base_dim": BASE, **changes}), 0)


def factors(dim: int, optim: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Factor on the rate, and rate times weight decay, of each parameter of the first layer and outside the layers."""
    built = model(dim, tie_embeddings=False)
    names = {parameter: name for name, parameter in built.named_parameters()}
    config = OptimConfig.model_validate({"lr": 0.01, "weight_decay": 0.3, **optim})
    return {
        names[parameter].removeprefix("layers.0."): (group["lr_factor"], group["lr_factor"] * group["weight_decay"])
        for group in build_groups(built, config)
        for parameter in group["params"]
        if "layers.1." not in names[parameter]
    }


@pytest.mark.parametrize("optim", [{}, {"kind": "muon", "adamw": {"lr": 0.02}}], ids=["adamw", "muon"])
def test_at_the_base_width_both_parametrizations_are_the_same(optim: dict[str, Any]) -> None:
    mup, standard = model(BASE), model(BASE, parametrization="standard", base_dim=None)
    tokens = torch.arange(20)[None]
    assert torch.equal(mup(tokens).logits, standard(tokens).logits)
    config = OptimConfig.model_validate({"lr": 0.01, **optim})
    groups = [
        [{**group, "params": len(group["params"])} for group in build_groups(each, config)] for each in (mup, standard)
    ]
    assert groups[0] == groups[1]


def test_initial_weights_have_the_standard_deviation_of_their_role() -> None:
    """Embeddings keep theirs; hidden matrices and routers have 1/sqrt(4) of it."""
    base, wide = model(BASE), model(4 * BASE)
    expected = {"embedding": 1.0, "attention": 0.5, "experts": 0.5, "router": 0.5}
    for (name, narrow), (parameter, role) in zip(base.named_parameters(), parameter_roles(wide).items(), strict=True):
        if role in expected:
            assert float(parameter.detach().std() / narrow.detach().std()) == pytest.approx(expected[role], rel=0.15), name


def test_rates_of_adamw_depend_on_the_role_and_the_product_with_decay_does_not() -> None:
    found = factors(4 * BASE, {})
    hidden = [*(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")), *(f"ffn.experts.w{i}" for i in (1, 2, 3))]
    assert {found[name] for name in (*hidden, "ffn.router.weight")} == {(0.25, 0.3)}
    assert {found[name] for name in ("embedding.weight", "head.weight")} == {(1.0, 0.3)}
    assert {found[name] for name in ("attention_norm.weight", "norm.weight")} == {(1.0, 0.0)}


@pytest.mark.parametrize("split_heads", [True, False])
def test_rates_of_muon_depend_on_the_shape(split_heads: bool) -> None:
    found = factors(4 * BASE, {"kind": "muon", "split_heads": split_heads, "adamw": {"lr": 0.02}})
    assert {found[f"attention.{name}.weight"][0] for name in ("wq", "wk", "wv")} == {0.25 if split_heads else 0.5}
    assert {found[name][0] for name in ("attention.wo.weight", "ffn.experts.w1", "ffn.experts.w2")} == {0.5}
    assert found["ffn.router.weight"] == (0.5, 0.3 * 2)  # twice the rate of Muon, by optim.adamw.lr, times 1/4
    assert found["embedding.weight"][0] == 2.0


def test_logits_are_divided_by_the_ratio_of_widths() -> None:
    wide, base_4 = model(4 * BASE), model(4 * BASE, parametrization="standard", base_dim=None)
    base_4.load_state_dict(wide.state_dict())
    tokens = torch.arange(20)[None]
    logits: Tensor = wide(tokens).logits
    torch.testing.assert_close(4 * logits, base_4(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_dim": None}, "parametrization is mup, which needs base_dim"),
        ({"parametrization": "standard"}, "base_dim is 32, but it belongs to parametrization: mup"),
    ],
)
def test_a_base_width_belongs_to_mup(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model(BASE, **changes)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("optim", ["kind=muon", "kind=adamw"])
def test_sizes_of_activations_do_not_depend_on_the_width(workplace: Path, optim: str) -> None:
    """The coordinate check on a small text: slopes of at most 0.1 with mup, and more without it."""
    settings = {
        "model.dim": 64,
        "model.num_heads": 4,
        "model.ffn.hidden_dim": 128,
        "model.init_std": 0.1,
        "model.init_embedding_mean": 0.3,
        "model.qk_norm": "true",
        "model.ffn.num_experts": 8,
        "train.batch_tokens": 512,
        "optim.lr": 0.02,
    }
    overrides = [f"--set={key}={value}" for key, value in settings.items()] + [f"--set=optim.{optim}"]
    command = [sys.executable, str(SCRIPT), "moe.yaml", *overrides, "--seeds=8", "--widths=32,64,128", "--json"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=True, timeout=300)
    slopes = json.loads(done.stdout)["slopes"]
    assert len(slopes["tiny-moe mup"]) == 5
    assert {part: slope for part, slope in slopes["tiny-moe mup"].items() if abs(slope) > 0.1} == {}
    assert all(slope > 0.4 for slope in slopes["tiny-moe standard"].values())
