"""Memory of one process, by purpose.

Computed from what the code stores, and tested against the tensors of real runs on one, two and four processes. Routing is
assumed even. Not included: allocator fragmentation, buffers of libraries, and temporaries inside one operation.
"""

from typing import NamedTuple

from moelm.config import DenseFFNConfig, MoEFFNConfig, RunConfig
from moelm.plan.strategy import BF16_BYTES, FP32_BYTES, Strategy
from moelm.plan.update import update_memory
from moelm.plan.weights import count_weights

INDEX_BYTES = 8


class Memory(NamedTuple):
    """Bytes of one process."""

    weights: int
    """This process's shard, float32."""
    gathered: int
    """Weights gathered from other processes, and copies in lower precision."""
    gradients: int
    optimizer: int
    """AdamW's two moments, Muon's one."""
    activations: int
    """What the forward pass of one micro-batch stores for the backward pass."""
    all_to_all: int
    """Send and receive buffers of one layer's expert parallelism."""
    update: int
    """Temporaries of Muon's update."""

    @property
    def total(self) -> int:
        """At the peak, in the first backward pass or, when activations and gathered weights are freed, in the update."""
        backward = self.gathered + self.activations + self.all_to_all
        return self.weights + self.gradients + self.optimizer + max(backward, self.update)

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**self._asdict(), "total": self.total}


def estimate_memory(config: RunConfig, strategy: Strategy) -> Memory:
    """The memory of one process; the config's vocabulary size must be known."""
    dims, optim = strategy.dims, config.optim
    trained = count_weights(config, lambda weight: weight.is_trained(optim))
    with_two_moments = count_weights(config, lambda weight: weight.uses_adamw(optim))
    own = trained.per_process(dims)
    unreduced = 0
    if dims.size > 1 and not dims.is_sharded and strategy.num_micro_batches(config) > 1:
        # Replicas are summed after the last micro-batch; until then FSDP holds an unreduced copy of the gradients.
        unreduced = trained.root + trained.dense + (trained.experts // dims.ep if dims.dp_replicate > 1 else 0)
    weights = count_weights(config)
    return Memory(
        weights=FP32_BYTES * weights.per_process(dims),
        gathered=_gathered(config, strategy),
        gradients=FP32_BYTES * (own + unreduced),
        optimizer=FP32_BYTES * (own + with_two_moments.per_process(dims)),
        activations=_activations(config, strategy),
        all_to_all=_all_to_all(config, strategy),
        update=update_memory(config, strategy),
    )


def _gathered(config: RunConfig, strategy: Strategy) -> int:
    dims, num_layers = strategy.dims, config.model.num_unique_layers
    weights = count_weights(config, gathered=dims)
    local_experts = weights.experts // dims.ep
    if dims.size == 1:
        return BF16_BYTES * (weights.dense + local_experts) if strategy.bf16 else 0
    # With expert parallelism alone, each process holds its experts completely.
    gathered_experts = 0 if dims.ep > 1 and dims.dp_replicate * dims.dp_shard == 1 else local_experts
    expert_shards = dims.dp_shard if dims.ep > 1 else dims.dense_mesh[1]
    # If weights are freed after use, two layers are gathered at a time: the current one and the prefetched one.
    layers = 0
    for count, shards in ((weights.dense, dims.dense_mesh[1]), (gathered_experts, expert_shards)):
        resharded = config.parallel.reshard_after_forward and shards > 1
        layers += count // num_layers * (min(2, num_layers) if resharded else num_layers)
    bf16_experts = BF16_BYTES * (local_experts - gathered_experts) if strategy.bf16 else 0
    return FP32_BYTES * weights.root + strategy.gathered_bytes(config) * layers + bf16_experts


def _activations(config: RunConfig, strategy: Strategy) -> int:
    model, element = config.model, strategy.activation_bytes
    tokens = strategy.micro_batch_rows * config.data.seq_len
    query_dim = model.num_heads * model.size_per_head
    kv_dim = model.kv_heads * model.size_per_head
    attention = FP32_BYTES * model.dim + element * (model.dim + 3 * query_dim + 3 * kv_dim)
    checkpoints, layers = [], []
    for index in range(model.num_layers):
        ffn = model.ffn_at(index)
        hidden, other, decisions = _ffn_activations(ffn, model.dim, strategy)
        if strategy.checkpointing == "selective":
            hidden = 0
        # Under expert parallelism the halves of a block are recomputed apart.
        halves = 1 if strategy.dims.ep == 1 else 2
        checkpoints.append(tokens * (halves * FP32_BYTES * model.dim + decisions))
        layers.append(tokens * (attention + FP32_BYTES * model.dim + hidden + other))
    stored = sum(checkpoints) + max(layers) if strategy.checkpointing == "full" else sum(layers)
    # The loss stores its gradients with respect to hidden states and head, not the logits.
    return stored + 2 * FP32_BYTES * tokens * model.dim + FP32_BYTES * (model.vocab_size or 0) * model.dim


def _ffn_activations(ffn: DenseFFNConfig | MoEFFNConfig, dim: int, strategy: Strategy) -> tuple[int, int, int]:
    """Bytes per token: hidden activations, everything else, and the routing decisions that `full` checkpointing stores."""
    element = strategy.activation_bytes
    if not isinstance(ffn, MoEFFNConfig):
        return 2 * element * ffn.hidden_dim, element * ffn.depth * dim, 0
    hidden = 2 * element * ffn.top_k * ffn.hidden_dim
    # The inputs of each depth, and the outputs, of which the gates' gradients are computed.
    rows = element * ffn.top_k * (ffn.depth + 1) * dim + 2 * INDEX_BYTES * ffn.top_k
    if ffn.shared_experts:
        hidden += 2 * element * ffn.shared_experts * ffn.hidden_dim
        rows += element * dim if strategy.bf16 else 0
    routing = FP32_BYTES * (dim + 5 * ffn.num_experts + 2 * ffn.top_k) + INDEX_BYTES * ffn.top_k
    decisions = FP32_BYTES * (2 * ffn.num_experts + ffn.top_k) + INDEX_BYTES * ffn.top_k
    return hidden, rows + routing, decisions


def _all_to_all(config: RunConfig, strategy: Strategy) -> int:
    ffn = config.model.ffn
    if strategy.dims.ep == 1 or not isinstance(ffn, MoEFFNConfig):
        return 0
    rows = strategy.micro_batch_rows * config.data.seq_len * ffn.top_k
    return 4 * rows * config.model.dim * strategy.activation_bytes
