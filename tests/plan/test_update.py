"""Counted weights and FLOPs of the update against real models and their optimizers."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moelm.config import RunConfig, load_config
from moelm.distributed.parallel_dims import ParallelDims
from moelm.model import Transformer, count_parameters
from moelm.model.roles import parameter_roles
from moelm.plan import count_model
from moelm.plan.update import slowest_update_flops, update_flops
from moelm.plan.weights import count_weights, model_weights
from moelm.train.optimizer import build_optimizer
from tests.distributed.launching import ROOT

TINY = ("model.dim=32", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=64")
MODELS = {
    "dense": ("dense", "model.ffn.hidden_dim=48", "model.tie_embeddings=false"),
    "moe": ("moe", "model.ffn.hidden_dim=24"),
    "narrow-experts": ("moe", "model.ffn.hidden_dim=80", "model.ffn.num_experts=3"),
    "shared": ("moe", "model.ffn.hidden_dim=24", "model.ffn.shared_experts=2", "model.ffn.every=2"),
    "one-expert": ("moe", "model.ffn.num_experts=1", "model.ffn.top_k=1", "model.qk_norm=true"),
    "looped": ("moe", "model.unique_layers=2", "model.sandwich_norm=true", "model.ffn.router.kind=noisy_topk"),
    "hash": ("moe", "model.ffn.router.kind=hash", "optim.groups.attention.lr=0"),
    "published": (
        "moe",
        "model.qk_norm=all_heads",
        "model.qkv_bias=true",
        "model.attention_output_bias=true",
        "model.ffn.shared_experts=1",
        "model.ffn.shared_gate=true",
        "model.ffn.first_dense=1",
    ),
    "frozen": ("moe", "optim.groups.experts.lr=0"),
}


def load(name: str, *overrides: str) -> RunConfig:
    return count_model(load_config(ROOT / f"tests/configs/{name}.yaml", [*TINY, *overrides]))[1]


@pytest.mark.parametrize("case", MODELS)
def test_weights_are_those_of_the_model(case: str) -> None:
    config = load(*MODELS[case])
    with torch.device("meta"):
        model = Transformer(config.model)
    built: Counter[tuple[str, tuple[int, ...]]] = Counter()
    routers = 0
    for parameter, role in parameter_roles(model).items():
        if role == "router":
            routers += parameter.numel()
        else:
            built[role, tuple(parameter.shape)] += 1
    counted: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for weight, number in model_weights(config).items():
        if weight.role == "router":
            routers -= number * weight.size
        else:
            counted[weight.role, weight.shape] += number
    assert counted == built
    assert routers == 0
    count, total = count_weights(config), count_parameters(config.model)
    assert (sum(count), count.experts) == (total.total, total.experts)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("case", MODELS)
def test_flops_are_those_of_a_real_update(case: str, kind: str) -> None:
    config = load(*MODELS[case], f"optim.kind={kind}")
    optimizer = build_optimizer(Transformer(config.model), config.optim, torch.float32)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step(squares=optimizer.gradient_squares().tolist())
    assert update_flops(config) == counter.get_total_flops()
    assert (update_flops(config) > 0) == (kind == "muon")


@pytest.mark.parametrize("steps", [3, 5])
def test_flops_are_proportional_to_the_iterations(steps: int) -> None:
    configs = [load(*MODELS["moe"], "optim.kind=muon", f"optim.newton_schulz_steps={number}") for number in (1, steps)]
    assert update_flops(configs[1]) == steps * update_flops(configs[0])


def test_many_processes_are_limited_by_the_largest_item() -> None:
    """No matrix is divided, so that one process orthogonalizes a whole query matrix, the largest."""
    config = load(*MODELS["moe"], "optim.kind=muon")
    whole, matrix = update_flops(config), 5 * 6 * 32**3
    assert slowest_update_flops(config, ParallelDims(2, 1, 1)) == whole / 2
    assert slowest_update_flops(config, ParallelDims(4096, 1, 1)) == matrix
