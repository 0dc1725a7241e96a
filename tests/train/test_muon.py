"""Muon against torch's, and a step of a whole model against plain loops written from the papers."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moelm.config import OptimConfig
from moelm.model import Transformer
from moelm.model.roles import HIDDEN_ROLES, parameter_roles
from moelm.train import polar
from moelm.train.muon import Muon
from moelm.train.optimizer import build_optimizer
from tests.tolerance import relative_error
from tests.train.test_optimizer import MOE, set_gradients, small_model, state_of, update
from tests.train.test_polar import exact

LR, DECAY, MOMENTUM, CLIP, STEPS = 0.02, 0.1, 0.9, 3.0, 5


def muon_config(**changes: object) -> OptimConfig:
    settings = {"kind": "muon", "lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "clip": CLIP}
    return OptimConfig.model_validate({**settings, "adamw": {"lr": 0.005}, **changes})


class Reference:
    """Muon (Jordan et al. 2024; Liu et al. 2025, algorithm 1) and AdamW, in float64, one matrix after another."""

    def __init__(self, weights: Mapping[str, Tensor], muon: set[str], heads: Mapping[str, int]) -> None:
        self.muon, self.heads = muon, heads
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.m, self.v = ({name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in range(2))

    def step(self, grads: Mapping[str, Tensor], number: int) -> None:
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        for name, weight in self.weights.items():
            grad = grads[name].double() * min(1.0, CLIP / norm)
            if name not in self.muon:
                self._adamw(name, grad, number)
            elif weight.dim() == 2:
                width = len(weight) // self.heads.get(name.rpartition("attention.")[2], 1)
                for start in range(0, len(weight), width):
                    rows = slice(start, start + width)
                    self._muon(weight[rows], grad[rows], self.m[name][rows])
            else:
                for expert in range(len(weight)):
                    if grad[expert].abs().max() > 0:
                        self._muon(weight[expert], grad[expert], self.m[name][expert])

    def _muon(self, weight: Tensor, grad: Tensor, momentum: Tensor) -> None:
        momentum.copy_(MOMENTUM * momentum + (1 - MOMENTUM) * grad)
        direction = exact((1 - MOMENTUM) * grad + MOMENTUM * momentum, STEPS)
        weight.copy_(weight - LR * (0.2 * math.sqrt(max(weight.shape)) * direction + DECAY * weight))

    def _adamw(self, name: str, grad: Tensor, number: int) -> None:
        weight = self.weights[name]
        self.m[name] = 0.9 * self.m[name] + 0.1 * grad
        self.v[name] = 0.95 * self.v[name] + 0.05 * grad**2
        direction = (self.m[name] / (1 - 0.9**number)) / ((self.v[name] / (1 - 0.95**number)).sqrt() + 1e-8)
        weight.copy_(weight - 0.005 * (direction + (DECAY * weight if weight.dim() > 1 else 0)))


def muon_names(model: Transformer) -> set[str]:
    roles = parameter_roles(model)
    return {name for name, parameter in model.named_parameters() if roles[parameter] in HIDDEN_ROLES}


@pytest.mark.parametrize("split_heads", [True, False])
def test_steps_of_a_whole_model_equal_loops_from_the_papers(split_heads: bool) -> None:
    model = small_model(ffn={**MOE, "shared_experts": 1}, num_kv_heads=2, head_dim=6, tie_embeddings=False)
    optimizer = build_optimizer(model, muon_config(split_heads=split_heads), torch.float32)
    heads = {"wq.weight": 4, "wk.weight": 2, "wv.weight": 2} if split_heads else {}
    reference = Reference(state_of(model), muon_names(model), heads)
    for number in range(1, 6):
        set_gradients(model, number)
        if number in (2, 3):  # no token has selected this expert
            for weight in model.layers[1].ffn.experts.parameters():
                weight.grad[3] = 0
        reference.step({name: parameter.grad for name, parameter in model.named_parameters()}, number)
        update(optimizer, LR)
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, reference.weights[name]) < 2e-5, name


def test_an_expert_without_tokens_is_not_moved_by_its_momentum() -> None:
    model = small_model()
    optimizer = build_optimizer(model, muon_config(), torch.float32)
    weight = model.layers[0].ffn.experts.w2
    for step in range(2):
        set_gradients(model, step)
        update(optimizer, LR)
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum"].clone()
    assert momentum[1].abs().max() > 0
    set_gradients(model, 3)
    weight.grad[1] = 0
    update(optimizer, LR)
    unchanged = [expert == 1 for expert in range(4)]
    assert [torch.equal(*pair) for pair in zip(weight, before, strict=True)] == unchanged
    assert [torch.equal(*pair) for pair in zip(optimizer.state[weight]["momentum"], momentum, strict=True)] == unchanged


def test_two_dimensional_parameters_equal_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's coefficients, and in float32, because torch's rounds to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(polar, "polynomials", lambda steps: [(3.4445, -4.7750, 2.0315)] * steps)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (16, 40), (64, 24)]
    own, other = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"weight_decay": DECAY, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    expected = torch.optim.Muon(other, lr=LR, **settings)
    muon = Muon(own, [1, 1, 1], MOMENTUM, STEPS, torch.float32)
    state = {parameter: {"momentum": torch.zeros_like(parameter)} for parameter in own}
    for _ in range(4):
        for pair in zip(own, other, strict=True):
            grad = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = grad.clone()
        with torch.no_grad():
            muon.step([{"params": own, "lr": LR, "weight_decay": DECAY}], state, 1.0, {p: [False] for p in own})
        expected.step()
        for parameter, reference in zip(own, other, strict=True):
            assert relative_error(parameter, reference) < 1e-6


def test_updates_have_the_size_of_adamws() -> None:
    """The root mean square of an update is about 0.2 times the rate for every shape (Liu et al. 2025, section 2.2)."""
    model = small_model(dim=32, ffn={**MOE, "hidden_dim": 64})
    optimizer = build_optimizer(model, muon_config(weight_decay=0.0), torch.float32)
    before = state_of(model)
    set_gradients(model)
    update(optimizer, LR)
    for name in muon_names(model):
        moved = model.get_parameter(name).detach() - before[name]
        assert moved.square().mean().sqrt() == pytest.approx(0.2 * LR, rel=0.15)
