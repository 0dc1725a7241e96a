"""What a step does beside matrix products and communication: passes over memory, and the host's small operations.

Bytes and operations are those of one process in one optimizer step, by what the code computes; kernels that read several
tensors at once count each of them.
"""

from moelm.config import MoEFFNConfig, RunConfig
from moelm.plan.strategy import FP32_BYTES, Strategy
from moelm.plan.weights import count_weights, model_weights

BACKWARD_PASSES = 2
"""Elements that the backward pass moves for each of the forward pass."""
LOGIT_BYTES = 30
"""Moved for each logit: written and read in the dtype of products, and in float32 by softmax, loss and their gradients."""
OPERATIONS_PER_TENSOR = 1
"""Small operations for each weight, outside of compiled graphs: what its gradient's norm needs."""


def activation_traffic(config: RunConfig, strategy: Strategy) -> float:
    """Bytes moved by everything between the matrix products of all forward and backward passes."""
    layers = range(config.model.num_layers)
    forward = sum(_layer_bytes(config, strategy, layer) for layer in layers)
    hidden = sum(_hidden_bytes(config, strategy, layer) for layer in layers)
    recomputed = {"none": 0, "selective": hidden, "full": forward}[strategy.checkpointing]
    forwards = 1 + BACKWARD_PASSES + strategy.needs_extra_forward(config)
    logits = LOGIT_BYTES * (config.model.vocab_size or 0)
    return config.train.batch_tokens / strategy.dims.size * (forwards * forward + recomputed + logits)


def cast_traffic(config: RunConfig, strategy: Strategy) -> float:
    """Bytes moved by casts of weights before the passes, and of gradients after them."""
    if not strategy.bf16:
        return 0.0
    own = count_weights(config).per_process(strategy.dims)
    trained = count_weights(config, lambda weight: weight.is_trained(config.optim)).per_process(strategy.dims)
    each = FP32_BYTES + strategy.activation_bytes
    forwards = 1 + strategy.needs_extra_forward(config)
    return strategy.num_micro_batches(config) * each * (forwards * own + trained)


def update_traffic(config: RunConfig, strategy: Strategy, optimizer_bytes: int) -> float:
    """Bytes moved by the gradients' norm and the update: gradients are read twice; weights and moments read and written.

    Args:
        optimizer_bytes: of the optimizer's moments.
    """
    trained = count_weights(config, lambda weight: weight.is_trained(config.optim)).per_process(strategy.dims)
    return 4 * FP32_BYTES * trained + 2 * optimizer_bytes


def small_operations(config: RunConfig) -> int:
    """Operations for which the GPU waits, because the host needs longer to start them than the GPU to compute them."""
    return OPERATIONS_PER_TENSOR * sum(model_weights(config).values())


def _layer_bytes(config: RunConfig, strategy: Strategy, layer: int) -> int:
    """Bytes per token that the forward pass of one layer moves outside of its products."""
    model, element = config.model, strategy.activation_bytes
    ffn = model.ffn_at(layer)
    norms = 2 * (FP32_BYTES + element) * model.dim  # the residual stream is float32
    additions = 2 * (2 * FP32_BYTES + element) * model.dim
    rotations = 2 * element * (model.num_heads + model.kv_heads) * model.size_per_head
    # Rows are read and written on the way to the experts and on the way back.
    rows = 4 * element * ffn.top_k * model.dim if isinstance(ffn, MoEFFNConfig) else 0
    return norms + additions + rotations + _hidden_bytes(config, strategy, layer) + rows


def _hidden_bytes(config: RunConfig, strategy: Strategy, layer: int) -> int:
    """Bytes per token that one layer's activation function moves: two hidden vectors read, their product written."""
    ffn = config.model.ffn_at(layer)
    active = ffn.top_k + ffn.shared_experts if isinstance(ffn, MoEFFNConfig) else 1
    return 3 * strategy.activation_bytes * active * ffn.hidden_dim
