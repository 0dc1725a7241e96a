"""The layouts of a plan, their communication, time and order."""

import json
from pathlib import Path

import pytest

from moelm.config import RunConfig, load_config
from moelm.distributed.parallel_dims import ParallelDims
from moelm.errors import MoelmError
from moelm.formats import exponent
from moelm.hardware import DEVICES
from moelm.model import count_parameters
from moelm.plan import count_model, make_plan
from moelm.plan.memory import estimate_memory
from moelm.plan.passes import activation_traffic, cast_traffic, small_operations, update_traffic
from moelm.plan.search import (
    COMPUTE_EFFICIENCY,
    LAUNCH_S,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    possible_dims,
    transfer_seconds,
)
from moelm.plan.strategy import Strategy
from moelm.plan.traffic import Collective, Traffic, step_collectives, total_traffic
from moelm.plan.update import update_flops
from moelm.plan.weights import Weight
from tests.conftest import Moelm
from tests.distributed.launching import ROOT

GB = 1e9


def find(name: str) -> Path:
    """A config for tests, or a shipped one."""
    own = ROOT / f"tests/configs/{name}.yaml"
    return own if own.exists() else ROOT / f"configs/{name}.yaml"


def load(name: str, *overrides: str) -> RunConfig:
    return count_model(load_config(find(name), overrides))[1]


def fp32_traffic(config: RunConfig, *dims: int) -> Traffic:
    return total_traffic(step_collectives(config, Strategy(ParallelDims(*dims), "none", 4, bf16=False)))


def test_layouts_are_all_products_that_the_model_allows() -> None:
    assert set(possible_dims(load("moe"), 4)) == {
        ParallelDims(*sizes) for sizes in [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
    }
    assert all(dims.ep == 1 for dims in possible_dims(load("dense"), 4))
    two_machines = set(possible_dims(load("mixtral-8x7b"), 16))
    assert {dims for dims in two_machines if dims.dense_shard} == {
        ParallelDims(*sizes, dense_shard=8)
        for sizes in [(8, 1, 2), (4, 1, 4), (2, 1, 8), (4, 2, 2), (1, 8, 2), (2, 2, 4), (1, 4, 4), (1, 2, 8), (2, 4, 2)]
        if sizes[1] == 1 or sizes[1] * sizes[2] != 8
    }


def test_other_weights_can_be_sharded_within_a_machine() -> None:
    """Gathered from one machine instead of from 16, they take less time: with 128 shards a step waits for the network."""
    config = load("mixtral-8x7b", f"train.batch_tokens={1024 * 8192}")
    step_s = {each.strategy.dims: each.step_s for each in make_plan(config, 1024, "h100").candidates}
    everywhere, machine = ParallelDims(1, 128, 8), ParallelDims(1, 128, 8, 8)
    assert step_s[machine] < 0.9 * step_s[everywhere]
    weights = {dims: estimate_memory(config, Strategy(dims, "none", 2, bf16=True)).weights for dims in step_s}
    dense = 46_702_792_704 - 32 * 8 * 3 * 4096 * 14336 - 32 * 8 * 4096
    assert weights[machine] - weights[everywhere] == pytest.approx(4 * dense * (1 / 8 - 1 / 1024), rel=1e-6)


def test_candidates_that_fit_come_first_ordered_by_time() -> None:
    plan = make_plan(load("mixtral-8x7b"), 64, "h100")
    fits = [candidate.fits for candidate in plan.candidates]
    assert fits == sorted(fits, reverse=True)
    assert plan.best.fits
    times = [candidate.step_s for candidate in plan.candidates if candidate.fits]
    assert times == sorted(times)
    assert not make_plan(load("mixtral-8x7b"), 8, "h100").best.fits


def test_a_batch_is_divided_no_further_than_memory_demands() -> None:
    """An exact balance loss of several micro-batches needs an extra pass, and weights are gathered for each of them."""
    best = make_plan(load("mixtral-8x7b"), 64, "h100").best
    assert best.strategy.micro_batch_rows == load("mixtral-8x7b").batch_rows // 64
    fixed = load("mixtral-8x7b", "train.micro_batch_tokens=16384")
    assert make_plan(fixed, 64, "h100").best.step_s > best.step_s
    dependent = [load("mixtral-8x7b", f"model.ffn.{key}") for key in ("balance.scope=micro", "capacity_factor=1.25")]
    for config in (fixed, *dependent):
        rows = {candidate.strategy.micro_batch_rows for candidate in make_plan(config, 64, "h100").candidates}
        assert rows <= {1, 4}


def test_sharded_weights_are_divided_and_replicas_are_not() -> None:
    config = load("mixtral-8x7b")
    parameters = 46_702_792_704

    def weights(*dims: int) -> float:
        return estimate_memory(config, Strategy(ParallelDims(*dims), "full", 1, bf16=True)).weights / GB

    assert weights(1, 1, 1) == pytest.approx(4 * parameters / GB, rel=1e-6)
    routers = 32 * 8 * 4096  # whole on every process
    assert weights(1, 64, 1) == pytest.approx(4 * ((parameters - routers) / 64 + routers) / GB, rel=1e-6)
    assert weights(8, 8, 1) == pytest.approx(4 * ((parameters - routers) / 8 + routers) / GB, rel=1e-6)
    # Expert parallelism over eight processes; all other parameters are replicated.
    dense = parameters - 32 * 8 * 3 * 4096 * 14336
    assert weights(1, 1, 8) == pytest.approx(4 * (dense + (parameters - dense) / 8) / GB, rel=1e-6)


def test_weights_are_gathered_with_their_padding() -> None:
    """FSDP pads dimension 0 to a multiple of the shards, and of experts the first dimension that it can divide."""
    dims = ParallelDims(1, 6, 1)
    vocabulary, stack, row = (
        Weight("root", "embedding", (258, 128)),
        Weight("experts", "experts", (8, 256, 120)),
        Weight("dense", "norm", (120,)),
    )
    assert vocabulary.gathered_size(dims) == vocabulary.size  # 258 = 6 x 43
    assert vocabulary.gathered_size(ParallelDims(1, 4, 1)) == 260 * 128
    assert stack.gathered_size(dims) == 12 * 256 * 120  # neither 8 nor 256
    assert stack.gathered_size(ParallelDims(1, 16, 1)) == stack.size  # along dimension 1
    assert stack.gathered_size(ParallelDims(1, 3, 2)) == stack.size  # not sharded by FSDP along dimension 0
    assert row.gathered_size(ParallelDims(1, 7, 1)) == 126
    assert Weight("routers", "router", (1024,)).gathered_size(dims) == 1024


def test_traffic_of_two_processes_in_closed_form() -> None:
    """One micro-batch, float32: all-reduce of P numbers sends 4 P bytes, all-gather and reduce-scatter half of that."""
    config = load("moe", "train.precision=fp32")
    parameters, experts, routers = 3_937_664, 4 * 8 * 3 * 128 * 256, 4 * 8 * 128
    sharded = parameters - routers
    assert fp32_traffic(config, 2, 1, 1) == (0, 0, 4 * parameters, 0, 0)
    assert fp32_traffic(config, 1, 2, 1) == (2 * 2 * sharded, 2 * sharded, 4 * routers, 0, 0)
    # Dispatch, combine and their gradients in four layers; half stays local: 1,024 tokens, two experts each, width 128.
    sent = 4 * 4 * 1024 * 2 * 128 * 4 // 2
    assert fp32_traffic(config, 1, 1, 2) == (0, 0, 4 * (parameters - experts), sent, 0)


def test_repeated_layers_are_gathered_at_each_repeat_and_reduced_once() -> None:
    config = load("moe", "train.precision=fp32")
    looped = load("moe", "train.precision=fp32", "model.unique_layers=2")
    plain, repeated = (fp32_traffic(each, 1, 2, 1) for each in (config, looped))
    assert repeated.all_gather == plain.all_gather
    fewer_routers = 2 * 8 * 128
    fewer = count_parameters(config.model).total - count_parameters(looped.model).total - fewer_routers
    assert plain.reduce_scatter - repeated.reduce_scatter == 2 * fewer
    assert plain.all_reduce - repeated.all_reduce == 4 * fewer_routers


def test_matrices_are_exchanged_by_the_processes_that_hold_them() -> None:
    """Elements sent by one process; a result returns to every replica, and experts are whole where they live."""
    config = load("moe", "train.precision=fp32", "optim.kind=muon")
    attention, experts = 4 * 4 * 128 * 128, 4 * 8 * 3 * 128 * 256

    def sent(*dims: int) -> float:
        return fp32_traffic(config, *dims).optimizer / 4

    assert sent(1, 1, 1) == 0
    assert sent(2, 1, 1) == (attention + experts) / 2  # half of the matrices, whole, to the other replica
    assert sent(1, 2, 1) == attention / 4 + attention / 4  # half of a matrix for each half of the matrices, both ways
    assert sent(1, 1, 2) == attention / 2
    # Shards of experts' matrices within two processes, beside replicas of four.
    assert sent(1, 2, 2) == attention / 4 * (3 / 4 + 3 / 4) + experts / 2 / 2 * (1 / 2 + 1 / 2)


def test_frozen_weights_have_no_gradients_to_reduce() -> None:
    config, frozen = (load("moe", "train.precision=fp32", *key) for key in ((), ("optim.groups.experts.lr=0",)))
    experts = 4 * 8 * 3 * 128 * 256
    assert fp32_traffic(config, 2, 1, 1).all_reduce - fp32_traffic(frozen, 2, 1, 1).all_reduce == 4 * experts
    assert fp32_traffic(config, 1, 2, 1).all_gather == fp32_traffic(frozen, 1, 2, 1).all_gather


def test_a_step_includes_the_update() -> None:
    """On one GPU, Muon adds its FLOPs, and moves two numbers fewer for each of its weights: those of one moment."""
    adamw, muon = (load("moe", f"optim.kind={kind}") for kind in ("adamw", "muon"))
    difference = make_plan(muon, 1, "h100").best.step_s - make_plan(adamw, 1, "h100").best.step_s
    device = DEVICES["h100"]
    matrices = 4 * 4 * 128 * 128 + 4 * 8 * 3 * 128 * 256
    products = update_flops(muon) / (device.peak_bf16 * COMPUTE_EFFICIENCY)
    bytes_per_s = device.memory_bandwidth * MEMORY_EFFICIENCY
    assert difference == pytest.approx(products - 2 * 4 * matrices / bytes_per_s, rel=1e-6)


@pytest.mark.parametrize(("name", "by_hand"), [("gpu-dense", 0.051), ("gpu-moe8", 0.070), ("gpu-moe64", 0.096)])
def test_times_are_near_an_estimate_kernel_by_kernel(name: str, by_hand: float) -> None:
    """16,384 tokens on one H100; many small experts cost weight-sized passes and slow products, and not only FLOPs.

    The estimate has 6 small operations for each weight instead of one: it is older than norms of several gradients at once.
    """
    config = count_model(load_config(ROOT / f"configs/{name}.yaml"))[1]
    later_saved = 5 * small_operations(config) * LAUNCH_S
    assert make_plan(config, 1, "h100").best.step_s + later_saved == pytest.approx(by_hand, rel=0.06)


def test_traffic_of_memory_by_the_tensors_that_a_step_moves() -> None:
    config = load("dense", "train.precision=bf16", "model.ffn.hidden_dim=512")
    strategy = Strategy(ParallelDims(), "none", 1, bf16=True)
    parameters = count_parameters(config.model).total
    micro_batches = config.batch_rows
    assert cast_traffic(config, strategy) == micro_batches * 2 * (4 + 2) * parameters  # weights once, gradients once
    assert update_traffic(config, strategy, 8 * parameters) == (2 * 4 + 2 * 4 + 2 * 8) * parameters
    assert cast_traffic(config, strategy._replace(bf16=False)) == 0
    dim, heads, logits = config.model.dim, config.model.num_heads + config.model.kv_heads, config.model.vocab_size or 0
    norms, additions = 2 * (4 + 2) * dim, 2 * (4 + 2 + 4) * dim
    layer = norms + additions + 2 * 2 * heads * config.model.size_per_head + 3 * 2 * 512
    expected = config.train.batch_tokens * (3 * config.model.num_layers * layer + 30 * logits)
    assert activation_traffic(config, strategy) == expected
    assert activation_traffic(config, strategy._replace(checkpointing="selective")) == (
        expected + config.train.batch_tokens * config.model.num_layers * 3 * 2 * 512
    )
    assert activation_traffic(config, strategy._replace(checkpointing="full")) == pytest.approx(
        expected + config.train.batch_tokens * config.model.num_layers * layer
    )


def test_temporaries_of_the_update_count_only_above_the_backward_pass() -> None:
    strategy = Strategy(ParallelDims(), "none", 1, bf16=False)
    memory = estimate_memory(load("moe", "optim.kind=muon"), strategy)
    backward = memory.gathered + memory.activations + memory.all_to_all
    rest = memory.weights + memory.gradients + memory.optimizer
    assert memory.total == rest + max(backward, memory.update)
    assert memory._replace(activations=0, gathered=0).total == rest + memory.update


def test_groups_within_a_machine_use_its_links_and_others_the_network() -> None:
    h100 = DEVICES["h100"]

    def bandwidth(size: int, stride: int) -> float:
        return 1e12 / transfer_seconds(Collective("all_gather", 1e12, size, stride), h100) / LINK_EFFICIENCY / GB

    assert [bandwidth(*group) for group in ((8, 1), (2, 4))] == pytest.approx([450, 450])
    assert [bandwidth(*group) for group in ((16, 1), (2, 8), (4, 4))] == pytest.approx([50, 50, 50])


def test_the_order_of_layouts_is_that_of_published_runs() -> None:
    """Mixtral 8x22B on 128 H100s has 4.3% MFU with FSDP, 23.4% with FSDP and ep (arXiv 2504.14960, table 1)."""
    shape = ("dim=6144", "num_layers=56", "num_heads=48", "ffn.hidden_dim=16384", "ffn.balance.scope=micro")
    overrides = [f"model.{argument}" for argument in shape]
    plan = make_plan(load("mixtral-8x7b", *overrides, "train.batch_tokens=1048576"), 128, "h100")
    mfu = {candidate.strategy.dims: candidate.mfu for candidate in plan.candidates}
    planned, published = (mfu[ParallelDims(1, 128, 1)], mfu[ParallelDims(1, 16, 8)]), (0.043, 0.234)
    assert planned[1] / planned[0] == pytest.approx(published[1] / published[0], rel=0.1)
    # Too high by the same factor for both: a plan has no waiting for the slowest expert.
    assert all(1 < plan / real < 2 for plan, real in zip(planned, published, strict=True))


def test_activation_checkpointing_is_smaller_and_slower() -> None:
    modes = ["none", "selective", "full"]
    none, selective, full = (
        make_plan(load("small-moe", f"parallel.activation_checkpointing={mode}"), 8, "h100").best for mode in modes
    )
    assert [candidate.strategy.checkpointing for candidate in (none, selective, full)] == modes
    assert none.memory.activations > selective.memory.activations > full.memory.activations
    assert none.step_s < selective.step_s < full.step_s


@pytest.mark.parametrize(
    ("gpus", "device", "sentence"),
    [
        (3, "h100", "3 processes cannot divide into equal shares"),
        (1, "tpu", "The device 'tpu' is unknown; one of h100, .* is expected"),
    ],
)
def test_an_impossible_plan_is_refused(gpus: int, device: str, sentence: str) -> None:
    with pytest.raises(MoelmError, match=sentence):
        make_plan(load("moe"), gpus, device)


def test_the_command_prints_a_table_and_json(moelm: Moelm) -> None:
    arguments = ["plan", str(ROOT / "configs/mixtral-8x7b.yaml"), "--gpus", "64"]
    table = moelm(*arguments)
    assert table.returncode == 0, table.stderr
    for text in ("46,702,792,704", "best", "all-to-all", "optimizer", "Assumed:"):
        assert text in table.stdout
    plan = json.loads(moelm(*arguments, "--json").stdout)
    assert plan["schema"] == 2
    assert plan["parameters_active"] == 12_879_925_248
    assert plan["best"] == plan["layouts"][0]
    assert plan["best"]["dp_replicate"] * plan["best"]["dp_shard"] * plan["best"]["ep"] == 64
    assert plan["best"]["memory_bytes"]["total"] < 80e9
    assert plan["assumptions"]


def test_the_command_prints_the_cost_of_the_optimizer(moelm: Moelm) -> None:
    arguments = ["plan", str(ROOT / "tests/configs/moe.yaml")]
    adamw, muon = (moelm(*arguments, f"optim.kind={kind}").stdout for kind in ("adamw", "muon"))
    assert "adamw: no matrix products, 31.5 MB of moments." in adamw
    plan = json.loads(moelm(*arguments, "optim.kind=muon", "--json").stdout)
    flops = plan["optimizer_flops_per_step"]
    heads, output = 3 * 4 * (4 * 32**2 * 128 + 2 * 32**3), 6 * 128**3
    assert flops == 5 * 4 * (heads + output + 8 * 3 * (4 * 128**2 * 256 + 2 * 128**3))
    share = flops / plan["training_flops"] * load("moe").train.steps
    assert f"muon: {exponent(flops)} FLOPs per step on all GPUs together, {share:.0%} of the model's; " in muon


def test_the_help_names_all_devices(moelm: Moelm) -> None:
    words = moelm("plan", "--help").stdout.replace(",", " ").replace(".", " ").split()
    assert set(DEVICES) <= set(words)
