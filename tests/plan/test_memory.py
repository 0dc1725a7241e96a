"""Estimated memory, and the update's FLOPs and messages, against real steps."""

import json
from pathlib import Path

import pytest

from moelm.config import RunConfig, load_config
from moelm.distributed.parallel_dims import resolve_parallel_dims
from moelm.plan import count_model
from moelm.plan.memory import estimate_memory
from moelm.plan.strategy import Strategy
from moelm.plan.traffic import step_collectives, total_traffic
from moelm.plan.update import slowest_update_flops, update_flops
from tests.plan.measured import main as measured_step
from tests.processes import run_ranks

ROOT = Path(__file__).parents[2]
SMALL = ("train.precision=fp32", "train.batch_tokens=2048")
MUON = ("optim.kind=muon",)
CASES = {
    "dense": ("dense", 1, ()),
    "moe-bf16": ("moe", 1, ("train.precision=bf16",)),
    "full": ("moe", 1, ("parallel.activation_checkpointing=full",)),
    "deep": ("moe", 1, ("model.ffn.depth=2",)),
    "looped": ("moe", 1, ("model.unique_layers=2",)),
    "replicas": ("moe", 2, ()),
    "ep": ("moe", 2, ("parallel.ep=2",)),
    "ep-full": ("moe", 2, ("parallel.ep=2", "parallel.activation_checkpointing=full")),
    "sharded-ep": ("moe", 4, ("parallel.dp_shard=2", "parallel.ep=2")),
    "sharded-ep-bf16": ("moe", 4, ("parallel.dp_shard=2", "parallel.ep=2", "train.precision=bf16")),
    "muon-dense": ("dense", 1, MUON),
    "muon-shared": ("moe", 1, (*MUON, "model.ffn.shared_experts=2", "model.ffn.every=2")),
    "muon-looped-bf16": ("moe", 1, (*MUON, "model.unique_layers=2", "train.precision=bf16")),
    "muon-frozen": ("moe", 2, (*MUON, "optim.groups.experts.lr=0", "optim.groups.embedding.lr=0")),
    "muon-adamw-experts": ("moe", 2, (*MUON, "optim.groups.experts.optimizer=adamw")),
    "muon-replicas": ("moe", 2, MUON),
    "muon-sharded-bf16": ("moe", 2, (*MUON, "parallel.dp_shard=2", "train.precision=bf16")),
    "muon-sharded-along-rows": ("moe", 2, (*MUON, "parallel.dp_shard=2", "model.ffn.num_experts=3")),
    "muon-ep": ("moe", 2, (*MUON, "parallel.ep=2")),
    "muon-replicas-sharded": ("dense", 4, (*MUON, "parallel.dp_shard=2", "parallel.dp_replicate=2")),
    "muon-replicas-ep": ("moe", 4, (*MUON, "parallel.ep=2")),
    "muon-sharded-ep": ("moe", 4, (*MUON, "parallel.dp_shard=2", "parallel.ep=2")),
}
COVERING = (
    "moe-bf16",
    "full",
    "replicas",
    "ep",
    "ep-full",
    "sharded-ep-bf16",
    "muon-shared",
    "muon-sharded-bf16",
    "muon-sharded-ep",
)
"""Cases that together have every kind of sharding, precision and optimizer."""


def layer_activations(config: RunConfig, strategy: Strategy) -> int:
    """Activations of one layer, from the estimates for models with one layer more and less."""
    fewer, more = (
        config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})
        for layers in (config.model.num_layers, config.model.num_layers + 1)
    )
    return estimate_memory(more, strategy).activations - estimate_memory(fewer, strategy).activations


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in COVERING else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
)
def test_estimates_agree_with_a_real_step(case: str) -> None:
    name, processes, overrides = CASES[case]
    arguments = [str(ROOT / f"tests/configs/{name}.yaml"), *SMALL, *overrides]
    done = run_ranks(measured_step, ["measured", *arguments], ROOT, processes)
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)
    measured = step["memory"]
    _, config = count_model(load_config(arguments[0], arguments[1:]))
    checkpointing, bf16 = config.parallel.activation_checkpointing, config.train.precision == "bf16"
    dims, rows = resolve_parallel_dims(config, processes), config.micro_batch_rows(processes)
    strategy = Strategy(dims, checkpointing, rows, bf16)
    assert strategy.num_micro_batches(config) == 1
    planned = estimate_memory(config, strategy)._asdict()
    gathered = planned.pop("gathered")
    if bf16 and processes == 1:
        planned["activations"] += gathered  # autocast's copies of the weights are stored like activations
    if checkpointing == "full":
        # Measured after the forward pass, before any layer is recomputed.
        planned["activations"] -= layer_activations(config, strategy._replace(checkpointing="none"))
    print(case, {kind: f"{planned[kind] / amount - 1:+.1%}" for kind, amount in measured.items() if amount})
    for kind, amount in measured.items():
        exact = kind in ("weights", "gradients", "optimizer")
        assert planned[kind] == pytest.approx(amount, rel=1e-6 if exact else 0.10), kind
    assert sum(step["update_flops"]) == update_flops(config)
    slowest = max(step["update_flops"])
    assert slowest_update_flops(config, dims) == pytest.approx(slowest, rel=0.10)
    messages = total_traffic(step_collectives(config, strategy)).optimizer
    assert processes * messages == pytest.approx(step["update_messages"], rel=1e-6)
