"""Muon's part of the optimizer's update: FLOPs, messages and temporaries.

AdamW has neither matrix products nor messages, and updates in place. Figures of one process are for an equal share of the
matrices, which the assignment of `moelm.distributed.matrix_exchange` approaches.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from moelm.config import RunConfig
from moelm.distributed.parallel_dims import ParallelDims, stack_shard_dim
from moelm.plan.strategy import Strategy
from moelm.plan.weights import Weight, model_weights


class Holders(NamedTuple):
    """The processes that hold parts of the same whole matrices, of which they exchange shards and results."""

    parts: int
    """Into which a stack of experts is divided, each with holders of its own."""
    replicas: int
    shards: int
    """Of each matrix in one replica."""
    stride: int
    """Difference between the ranks of neighbors."""

    @property
    def size(self) -> int:
        """Processes that hold a part of one matrix."""
        return self.replicas * self.shards

    @property
    def gathered(self) -> float:
        """What one process sends to bring matrices together, as a fraction of the part of the stack."""
        return (self.shards - 1) / self.shards / self.size

    @property
    def returned(self) -> float:
        """What one process sends to return results to all holders, as a fraction of the part of the stack."""
        return (self.replicas - 1 / self.shards) / self.size


def holders_of(weight: Weight, dims: ParallelDims) -> Holders:
    """The holders of a weight as `moelm.distributed.parallelize` shards it."""
    replicas, shards = dims.dense_mesh
    if weight.section == "experts":
        if dims.ep > 1:
            return Holders(dims.ep, dims.dp_replicate, dims.dp_shard, dims.ep)
        experts, rows, _ = weight.shape
        if stack_shard_dim(experts, rows, shards) == 0:
            return Holders(shards, replicas, 1, shards)
    return Holders(1, replicas, shards, 1)


def muon_weights(config: RunConfig) -> Counter[Weight]:
    """The weights that Muon updates."""
    return Counter({weight: n for weight, n in model_weights(config).items() if weight.uses_muon(config.optim)})


def update_flops(config: RunConfig) -> int:
    """FLOPs of the matrix products of one update of the whole model, counted as in `moelm.model.flops`."""
    return sum(
        number * _num_matrices(weight) * _matrix_flops(config, weight) for weight, number in muon_weights(config).items()
    )


def slowest_update_flops(config: RunConfig, dims: ParallelDims) -> float:
    """FLOPs of the process with the most: an equal share, or the largest item if that is more."""
    items = (_matrices_per_item(weight, dims) * _matrix_flops(config, weight) for weight in muon_weights(config))
    return max(update_flops(config) / dims.size, *items, 0)


class Exchange(NamedTuple):
    """Bytes that one process sends in one update among the same holders, the mean over processes."""

    holders: Holders
    gathered: float
    """Shards, to the process that orthogonalizes the whole matrix."""
    returned: float
    """Shards of the results, to all holders."""


def exchanges(config: RunConfig, strategy: Strategy) -> Iterator[Exchange]:
    """All messages of one update."""
    sizes: dict[Holders, int] = defaultdict(int)
    for weight, number in muon_weights(config).items():
        sizes[holders_of(weight, strategy.dims)] += number * weight.size
    for holders, size in sizes.items():
        sent = strategy.activation_bytes * size / holders.parts
        yield Exchange(holders, holders.gathered * sent, holders.returned * sent)


def update_memory(config: RunConfig, strategy: Strategy) -> int:
    """Bytes of the temporaries of one process at the peak of the update.

    Its shards of the updates exist until the end. Beside them are first its whole matrices and an iteration on a batch,
    then the messages of the results, and then the stacks that are assembled from those.
    """
    dims = strategy.dims
    shards = results = gathered = assembled = 0.0
    batches: dict[tuple[int, int], float] = defaultdict(float)
    costs: dict[tuple[int, int], int] = defaultdict(int)
    for weight, number in muon_weights(config).items():
        holders, shape = holders_of(weight, dims), block_shape(config, weight)
        share = number * weight.size / dims.size
        shards += share * holders.replicas
        assembled += share * holders.replicas if len(weight.shape) == 3 and holders.size > 1 else 0
        results += share
        gathered += share if holders.shards > 1 else 0
        batches[shape] += share
        matrix = weight.shape[-2] * weight.shape[-1]
        costs[shape] = max(costs[shape], _matrices_per_item(weight, dims) * matrix * min(shape))
    iteration = finished = 0.0
    for shape in sorted(batches, key=lambda shape: -costs[shape]):  # in the order of `MatrixExchange`
        batch = batches[shape]
        # Input and output of an iteration, and its two products of n x n.
        iteration = max(iteration, finished + 2 * batch * (1 + min(shape) / max(shape)))
        finished += batch
    element = strategy.activation_bytes
    received = sum(each.returned for each in exchanges(config, strategy)) / element
    return round(element * (shards + max(gathered + iteration, results + received + max(received, assembled))))


def _num_matrices(weight: Weight) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 1


def _matrices_per_item(weight: Weight, dims: ParallelDims) -> int:
    """Matrices of a stack that one process orthogonalizes, at most."""
    holders = holders_of(weight, dims)
    return -(-_num_matrices(weight) // (holders.parts * holders.size))


def _matrix_flops(config: RunConfig, weight: Weight) -> int:
    """Of the orthogonalization of one matrix: in each iteration its Gram matrix, the square of that, and their product."""
    shape = block_shape(config, weight)
    short, long = sorted(shape)
    blocks = weight.shape[-2] // shape[0]
    return blocks * config.optim.newton_schulz_steps * (4 * short**2 * long + 2 * short**3)


def block_shape(config: RunConfig, weight: Weight) -> tuple[int, int]:
    """Of what is orthogonalized by itself: a matrix or a head."""
    rows, columns = weight.shape[-2:]
    return (rows // weight.heads if config.optim.split_heads else rows), columns
