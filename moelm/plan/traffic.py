"""Bytes that one process sends in one optimizer step, by collective.

Rings and pairwise exchanges are assumed: an all-gather or reduce-scatter over n processes sends (n-1)/n of the tensor, an
all-reduce twice that.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.distributed.parallel_dims import ParallelDims
from moelm.plan.strategy import BF16_BYTES, FP32_BYTES, Strategy
from moelm.plan.update import exchanges
from moelm.plan.weights import WeightCount, count_weights


class Collective(NamedTuple):
    """All collectives of one kind in one process group during one step."""

    kind: str
    """A field of `Traffic`."""
    bytes: float
    """Sent by one process."""
    group_size: int
    stride: int
    """Difference between the ranks of neighbors in the group."""


class Traffic(NamedTuple):
    """Bytes that one process sends in one step."""

    all_gather: int
    """Sharded weights."""
    reduce_scatter: int
    """Gradients of sharded weights."""
    all_reduce: int
    """Gradients of replicas, and of routers."""
    all_to_all: int
    """Tokens to experts and back, and their gradients."""
    optimizer: int
    """Matrices to the processes that orthogonalize them, and the results back; the mean over processes."""


def total_traffic(collectives: Iterable[Collective]) -> Traffic:
    """Sums by kind."""
    sent = list(collectives)
    return Traffic(*(round(sum(each.bytes for each in sent if each.kind == kind)) for kind in Traffic._fields))


def step_collectives(config: RunConfig, strategy: Strategy) -> Iterator[Collective]:
    """The collectives of one step; those in a group of one send nothing."""
    dims = strategy.dims
    param_bytes = strategy.gathered_bytes(config)
    grad_bytes = FP32_BYTES if config.parallel.reduce_dtype == "fp32" else BF16_BYTES
    resharded = config.parallel.reshard_after_forward
    micro_batches = strategy.num_micro_batches(config)
    # Weights that are not freed after a forward pass are gathered once for all following passes.
    gathers = micro_batches * (2 + strategy.needs_extra_forward(config) if resharded else 1)
    # A repeated layer is gathered at each repeat; its gradient is reduced once.
    repeats = config.model.num_layers // config.model.num_unique_layers if resharded else 1
    reductions = micro_batches if dims.is_sharded else 1
    dense_replicas, dense_shards = dims.dense_mesh
    weights = count_weights(config, gathered=dims)
    trained = count_weights(config, lambda weight: weight.is_trained(config.optim), gathered=dims)
    (dense, experts), (dense_grads, expert_grads) = (_by_mesh(count, dims) for count in (weights, trained))
    # The root is gathered in float32.
    for gathered, gradients, replicas, shards, stride in (
        (
            FP32_BYTES * weights.root + repeats * param_bytes * dense,
            trained.root + dense_grads,
            dense_replicas,
            dense_shards,
            1,
        ),
        (repeats * param_bytes * experts, expert_grads, dims.dp_replicate, dims.dp_shard, dims.ep),
    ):
        yield Collective("all_gather", gathers * _remote_fraction(shards) * gathered, shards, stride)
        yield Collective("reduce_scatter", reductions * grad_bytes * _remote_fraction(shards) * gradients, shards, stride)
        all_reduced = 2 * reductions * grad_bytes * _remote_fraction(replicas) * gradients / shards
        yield Collective("all_reduce", all_reduced, replicas, stride * shards)
    yield Collective("all_reduce", 2 * FP32_BYTES * _remote_fraction(dims.size) * trained.routers, dims.size, 1)
    all_to_all = _remote_fraction(dims.ep) * _dispatched_bytes(config, strategy) * micro_batches
    yield Collective("all_to_all", all_to_all, dims.ep, 1)
    for exchange in exchanges(config, strategy):
        holders = exchange.holders
        yield Collective("optimizer", exchange.gathered + exchange.returned, holders.size, holders.stride)


def _by_mesh(count: WeightCount, dims: ParallelDims) -> tuple[int, int]:
    """Elements of one process's layers on the mesh of dense parameters, and on that of experts."""
    if dims.ep == 1:
        return count.dense + count.experts, 0
    return count.dense, count.experts // dims.ep


def _remote_fraction(group_size: int) -> float:
    return (group_size - 1) / group_size


def _dispatched_bytes(config: RunConfig, strategy: Strategy) -> int:
    """Bytes of one micro-batch's rows in all dispatches and combines, including rows whose expert is on this process."""
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig):
        return 0
    rows = strategy.micro_batch_rows * config.data.seq_len * ffn.top_k
    transfers = 4 + 2 * strategy.needs_extra_forward(config) + 2 * (strategy.checkpointing == "full")
    return len(config.model.sparse_layers) * transfers * rows * config.model.dim * strategy.activation_bytes
