"""The roles of parameters, and the settings of each role."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moelm.config import OptimConfig, load_config
from moelm.errors import MoelmError
from moelm.model import build_model
from moelm.model.roles import HIDDEN_ROLES, parameter_roles
from moelm.train.optimizer import build_optimizer
from moelm.train.parameter_groups import build_groups
from tests.train.test_optimizer import MOE, set_gradients, small_model, state_of, update

ROOT = Path(__file__).parents[2]
ROLES = ("embedding", "head", "attention", "ffn", "experts", "router", "norm")


def names_by_role(**changes: Any) -> dict[str, set[str]]:
    """The last two parts of the names of each role's parameters."""
    model = small_model(**changes)
    roles = parameter_roles(model)
    found = defaultdict(set)
    for name, parameter in model.named_parameters():
        found[roles[parameter]].add(".".join(name.split(".")[-2:]))
    return found


ATTENTION = {f"{name}.weight" for name in ("wq", "wk", "wv", "wo")}
NORMS = {f"{name}.weight" for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm", "norm")}


def test_every_parameter_has_the_role_of_its_module() -> None:
    common = {"embedding": {"embedding.weight"}, "attention": ATTENTION, "norm": NORMS}
    experts = {f"experts.w{number}" for number in (1, 2, 3)}
    dense = {f"ffn.w{number}" for number in (1, 2, 3)}
    assert names_by_role() == {**common, "experts": experts, "router": {"router.weight"}}
    assert names_by_role(ffn={"kind": "dense", "hidden_dim": 8}) == {**common, "ffn": dense}
    noisy = {**MOE, "router": {"kind": "noisy_topk"}, "every": 2, "shared_experts": 1}
    assert names_by_role(ffn=noisy, tie_embeddings=False) == {
        **common,
        "head": {"head.weight"},
        "ffn": dense | {f"shared.w{number}" for number in (1, 2, 3)},
        "experts": experts,
        "router": {"router.weight", "router.noise_weight"},
    }
    assert names_by_role(ffn={**MOE, "num_experts": 1, "top_k": 1})["ffn"] == experts


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("role", ROLES)
def test_a_factor_of_zero_freezes_a_role_alone(kind: str, role: str) -> None:
    model = small_model(tie_embeddings=False, ffn={**MOE, "shared_experts": 1})
    optimizer = build_optimizer(
        model, OptimConfig.model_validate({"kind": kind, "lr": 0.01, "groups": {role: {"lr": 0}}}), torch.float32
    )
    before, roles = state_of(model), parameter_roles(model)
    set_gradients(model)
    update(optimizer, 0.01)
    for name, parameter in model.named_parameters():
        frozen = roles[parameter] == role
        assert torch.equal(parameter, before[name]) == frozen, name
        assert parameter.requires_grad != frozen


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_factors_scale_the_rate_and_weight_decay_is_replaced(kind: str) -> None:
    """Without decay an update is proportional to the rate; a role's own decay replaces the common one."""
    groups = {role: {"lr": 0.5 + number, "weight_decay": 0.0} for number, role in enumerate(ROLES)}
    config = OptimConfig.model_validate(
        {"kind": kind, "lr": 0.01, "weight_decay": 0.3, "groups": {**groups, "norm": {"weight_decay": 0.2}}}
    )
    plain, grouped = small_model(), small_model()
    before = state_of(plain)
    for model, own in ((plain, OptimConfig(kind=kind, lr=0.01, weight_decay=0.0)), (grouped, config)):
        optimizer = build_optimizer(model, own, torch.float32)
        set_gradients(model)
        update(optimizer, 0.01)
    roles = parameter_roles(grouped)
    for (name, parameter), reference in zip(grouped.named_parameters(), plain.parameters(), strict=True):
        factor, decay = 0.5 + ROLES.index(roles[parameter]), 0.0
        if roles[parameter] == "norm":
            factor, decay = 1.0, 0.2
        expected = factor * (reference - before[name]) - 0.01 * decay * before[name]
        torch.testing.assert_close(parameter - before[name], expected, rtol=1e-4, atol=1e-6)


def test_muon_updates_matrices_by_role_and_not_by_shape() -> None:
    model = small_model()  # its tied embedding and its routers are matrices too
    config = OptimConfig.model_validate({"kind": "muon", "lr": 0.02, "adamw": {"lr": 0.005}})
    optimizer = build_optimizer(model, config, torch.float32)
    optimizer.set_lr(0.01)  # half of the peak, in the course of the schedule
    roles = parameter_roles(model)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.01 if group["kind"] == "muon" else 0.0025)
        for parameter in group["params"]:
            assert (group["kind"] == "muon") == (roles[parameter] in HIDDEN_ROLES)
            assert optimizer.state[parameter].keys() == (
                {"momentum"} if group["kind"] == "muon" else {"step", "exp_avg", "exp_avg_sq"}
            )
    assert {id(p) for p in optimizer.parameters} == {id(p) for p in model.parameters()}


def test_a_role_that_muon_would_update_can_have_adamw() -> None:
    """Its update, rate and decay are then those of a run with AdamW alone; other roles keep Muon."""
    settings = {"lr": 0.02, "weight_decay": 0.1}
    kinds = {"muon": {**settings, "kind": "muon", "adamw": {"lr": 0.02}}, "adamw": {**settings, "kind": "adamw"}}
    kinds["mixed"] = {**kinds["muon"], "groups": {"experts": {"optimizer": "adamw"}, "embedding": {"optimizer": "adamw"}}}
    models = {}
    for kind, config in kinds.items():
        models[kind] = small_model()
        optimizer = build_optimizer(models[kind], OptimConfig.model_validate(config), torch.float32)
        set_gradients(models[kind])
        update(optimizer, 0.02)
    roles = parameter_roles(models["mixed"])
    states = {kind: dict(model.named_parameters()) for kind, model in models.items()}
    for name, parameter in states["mixed"].items():
        expected = "adamw" if roles[parameter] not in HIDDEN_ROLES or roles[parameter] == "experts" else "muon"
        assert torch.equal(parameter, states[expected][name]), name
    assert not torch.equal(states["adamw"]["layers.0.ffn.experts.w1"], states["muon"]["layers.0.ffn.experts.w1"])


@pytest.mark.parametrize(("ffn", "tied"), [("dense", True), ("moe", True), ("moe", False)])
def test_a_config_that_trains_none_of_its_parameters_is_refused(ffn: str, tied: bool) -> None:
    config = ROOT / f"tests/configs/{ffn}.yaml"
    absent = {"dense": {"experts", "router"}, "moe": {"ffn"}}[ffn] | ({"head"} if tied else set())
    present = [f"optim.groups.{role}.lr=0" for role in ROLES if role not in absent]
    common = [f"model.tie_embeddings={str(tied).lower()}"]
    with pytest.raises(MoelmError, match="lr to 0 for all roles that this model has"):
        load_config(config, [*common, *present])
    load_config(config, [*common, *present[1:]])


def test_the_gate_of_shared_experts_is_trained_with_a_router_that_learns_nothing() -> None:
    frozen = [f"optim.groups.{role}.lr=0" for role in ROLES if role != "router"]
    ffn = "model.ffn={kind: moe, hidden_dim: 8, num_experts: 4, top_k: 2, shared_experts: 1, router: {kind: hash}"
    config = ROOT / "tests/configs/moe.yaml"
    with pytest.raises(MoelmError, match="lr to 0 for all roles that this model has"):
        load_config(config, [*frozen, f"{ffn}}}"])
    trained = load_config(config, [*frozen, f"{ffn}, shared_gate: true}}", "model.vocab_size=50"])
    (group,) = build_groups(build_model(trained.model, 0), trained.optim)
    assert {tuple(parameter.shape) for parameter in group["params"]} == {(1, trained.model.dim)}
