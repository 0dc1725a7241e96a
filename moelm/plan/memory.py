"""Bytes that one process needs, by what they are for.

Counted from what the code keeps, and checked against the tensors of real runs on one, two and four processes. Routing is
taken to be even. Left out: the allocator's gaps, a library's own buffers, and what lives only inside one operation.
"""

from typing import Any, NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.distributed.layout import Layout
from moelm.model.counting import count_parameters

FLOAT32 = 4
INDEX = 8
"""Bytes of an index."""


class Setting(NamedTuple):
    """A way to run a config: on which layout, with what kept, with how much at once."""

    layout: Layout
    checkpointing: str
    """`parallel.activation_checkpointing`."""
    micro_rows: int
    """Rows in one forward pass."""
    low: bool
    """Whether products are made in bfloat16."""


class Weights(NamedTuple):
    """Numbers of parameters as a layout sees them."""

    root: int
    """Embedding, last norm, head."""
    trunk: int
    """The layers' but for the experts, all of them."""
    experts: int
    """The routed experts of all layers."""
    layers: int


class Memory(NamedTuple):
    """Bytes of one process at the most crowded moment, the first backward pass."""

    weights: int
    """Float32, this process's part."""
    gathered: int
    """Weights of others that are here for a while, and copies in lower precision."""
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """What the forward pass of one micro-batch keeps for the backward pass."""
    exchange: int
    """Rows of one layer on their way to experts elsewhere and back."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "total": self.total}


def weights_of(config: RunConfig) -> Weights:
    """The parameters of a config whose vocabulary is known."""
    model = config.model
    counted = count_parameters(model)
    root = counted.embedding * (1 if model.tie_embeddings else 2) + model.dim
    return Weights(root, counted.total - counted.experts - root, counted.experts, model.layers_built)


def estimate_memory(config: RunConfig, setting: Setting) -> Memory:
    """Memory of one process."""
    layout, counted = setting.layout, weights_of(config)
    shared = layout.trunk[1]
    experts_shared = layout.ep * layout.dp_shard
    own = (counted.root + counted.trunk) // shared + counted.experts // experts_shared
    whole_gradients = 0
    several = setting.micro_rows * layout.size < config.batch_rows
    if layout.size > 1 and layout.dp_shard == 1 and several:
        # Whole copies wait for the last micro-batch before they sum, with gradients of their own for as long.
        whole_gradients = counted.root + counted.trunk + (counted.experts // layout.ep if layout.dp_replicate > 1 else 0)
    return Memory(
        weights=FLOAT32 * own,
        gathered=_gathered(config, setting, counted),
        gradients=FLOAT32 * (own + whole_gradients),
        optimizer=2 * FLOAT32 * own,
        activations=_activations(config, setting),
        exchange=_exchange(config, setting),
    )


def _gathered(config: RunConfig, setting: Setting, counted: Weights) -> int:
    layout = setting.layout
    matrices = counted.trunk + counted.experts // layout.ep
    if layout.size == 1:
        return 2 * matrices if setting.low else 0
    wide = FLOAT32 if config.parallel.param_dtype == "float32" or not setting.low else 2
    experts_here = counted.experts // layout.ep
    if layout.ep > 1 and layout.dp_replicate * layout.dp_shard == 1:
        experts_here = 0  # held once and for all, not gathered
    layer = (counted.trunk + experts_here) // counted.layers
    # Two layers at a time when each is given back: the one in use and the next.
    layers = 2 if config.parallel.reshard_after_forward and layout.dp_shard > 1 else counted.layers
    low_experts = 2 * (counted.experts // layout.ep - experts_here) if setting.low else 0
    return FLOAT32 * counted.root + wide * min(layers, counted.layers) * layer + low_experts


def _activations(config: RunConfig, setting: Setting) -> int:
    model = config.model
    wide = 2 if setting.low else FLOAT32
    tokens = setting.micro_rows * config.data.seq_len
    queries = model.num_heads * model.size_per_head
    keys = model.kv_heads * model.size_per_head
    fused = model.dim * (queries + 2 * keys) * wide
    vocab = (model.vocab_size or 0) * model.dim
    per_layer = []
    for layer in range(model.num_layers):
        ffn = model.ffn_at(layer)
        attention = FLOAT32 * model.dim + wide * (model.dim + 3 * queries + 3 * keys)
        if isinstance(ffn, MoEFFNConfig):
            hidden = 2 * wide * ffn.top_k * ffn.hidden_dim
            rows = wide * ffn.top_k * (ffn.depth + (ffn.depth > 1)) * model.dim + 2 * INDEX * ffn.top_k
            routing = FLOAT32 * (model.dim + 5 * ffn.num_experts + 2 * ffn.top_k) + INDEX * ffn.top_k
            decided = FLOAT32 * (2 * ffn.num_experts + ffn.top_k) + INDEX * ffn.top_k
            if ffn.shared_experts:
                hidden += 2 * wide * ffn.shared_experts * ffn.hidden_dim
                rows += wide * model.dim if setting.low else 0
        else:
            hidden = 2 * wide * ffn.hidden_dim
            rows, routing, decided = wide * ffn.depth * model.dim, 0, 0
        if setting.checkpointing == "selective":
            hidden = 0
        whole = tokens * (attention + FLOAT32 * model.dim + hidden + rows + routing) + fused
        per_layer.append((tokens * (FLOAT32 * model.dim + decided), whole))
    if setting.checkpointing == "full":
        layers = sum(kept for kept, _ in per_layer) + max(whole for _, whole in per_layer)
    else:
        layers = sum(whole for _, whole in per_layer)
    # The loss keeps its gradients instead of its scores.
    return layers + 2 * FLOAT32 * tokens * model.dim + FLOAT32 * vocab


def _exchange(config: RunConfig, setting: Setting) -> int:
    ffn = config.model.ffn
    if setting.layout.ep == 1 or not isinstance(ffn, MoEFFNConfig):
        return 0
    rows = setting.micro_rows * config.data.seq_len * ffn.top_k
    return 4 * rows * config.model.dim * (2 if setting.low else FLOAT32)
