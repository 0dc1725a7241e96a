"""AdamW and clipping, against torch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import ModelConfig, OptimConfig
from moelm.model import Transformer, build_model
from moelm.train.gradient_norm import gradient_norm
from moelm.train.optimizer import Optimizer, build_optimizer
from tests.tolerance import assert_close

MOE = {"kind": "moe", "hidden_dim": 12, "num_experts": 4, "top_k": 2}


def small_model(**changes: Any) -> Transformer:
    shape = {"dim": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "qk_norm": True, "ffn": MOE, **changes}
    return build_model(ModelConfig.model_validate(shape), seed=0)


def set_gradients(model: torch.nn.Module, step: int = 0, scale: float = 1.0) -> None:
    """Random gradients, the same for every model of this shape."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def update(optimizer: Optimizer, lr: float) -> None:
    optimizer.set_lr(lr)
    optimizer.step(squares=optimizer.gradient_squares().tolist())


def state_of(model: Transformer) -> dict[str, Tensor]:
    """A copy of the weights by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_adamw_equals_torch(clip: float) -> None:
    own, other = small_model(), small_model()
    config = OptimConfig(lr=0.01, clip=clip, weight_decay=0.2)
    optimizer = build_optimizer(own, config, torch.float32)
    matrices, vectors = ([p for p in other.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(4):
        for model in (own, other):
            set_gradients(model, step)
        assert_close(
            torch.tensor(gradient_norm(optimizer.gradient_squares().tolist())),
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip),
        )
        update(optimizer, 0.01)
        expected.step()
    for parameter, reference in zip(own.parameters(), other.parameters(), strict=True):
        assert_close(parameter, reference)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_clipping_is_a_factor_on_the_gradients(kind: str) -> None:
    """Clipped gradients move the weights as gradients of that norm do."""
    clipped, scaled = small_model(), small_model()
    optimizers = [
        build_optimizer(model, OptimConfig(kind=kind, lr=0.01, clip=clip, eps=1e-3), torch.float32)
        for model, clip in ((clipped, 0.25), (scaled, 1e9))
    ]
    for step in range(3):
        set_gradients(clipped, step, scale=1.0 + step)
        norm = gradient_norm(optimizers[0].gradient_squares().tolist())
        set_gradients(scaled, step, scale=(1.0 + step) * 0.25 / norm)
        for optimizer in optimizers:
            update(optimizer, 0.01)
    for parameter, reference in zip(clipped.parameters(), scaled.parameters(), strict=True):
        assert_close(parameter, reference, epsilons=256)
