"""Parameter and FLOP counts of a model, computed from its config.

A FLOP is one multiplication or one addition of a matrix product; norms, activations and softmax are not counted. Attention
is counted with `seq_len` (or `window`) keys for every query.
"""

from typing import NamedTuple

from moelm.config import (
    HashRouterConfig,
    HierarchicalRouterConfig,
    ModelConfig,
    MoEFFNConfig,
    NoisyTopKRouterConfig,
    RandomRouterConfig,
)


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters used for one token: `top_k` of the routed experts and everything else, embedding and head included."""
    embedding: int
    """The input embedding."""
    experts: int
    """All routed experts."""


class FlopCount(NamedTuple):
    """FLOPs per token."""

    forward: int
    backward: int

    @property
    def training(self) -> int:
        """Forward and backward together."""
        return self.forward + self.backward


def _vocab(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("model.vocab_size must be known to count the model")
    return config.vocab_size


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model that `build_model` builds from this config."""
    dim = config.dim
    embedding = _vocab(config) * dim
    total = embedding * (1 if config.tie_embeddings else 2) + dim
    layers = [count_layer(config, layer) for layer in range(config.num_unique_layers)]
    active = total + sum(layer.active for layer in layers)
    return ParameterCount(
        total + sum(layer.total for layer in layers), active, embedding, sum(layer.experts for layer in layers)
    )


def count_layer(config: ModelConfig, layer: int) -> ParameterCount:
    """Parameters of one layer."""
    dim = config.dim
    heads = config.num_heads + config.kv_heads
    shared = (4 if config.sandwich_norm else 2) * dim + _attention_weights(config)
    if config.qk_norm:
        shared += config.size_per_head * (heads if config.qk_norm == "all_heads" else 2)
    if config.qkv_bias:
        shared += config.size_per_head * (heads + config.kv_heads)
    shared += config.attention_output_bias * dim
    ffn = config.ffn_at(layer)
    expert = 3 * dim * ffn.hidden_dim
    if not isinstance(ffn, MoEFFNConfig):
        return ParameterCount(shared + expert, shared + expert, 0, 0)
    shared += router_weights(dim, ffn) + ffn.shared_experts * expert + ffn.shared_gate * dim
    experts = ffn.num_experts * expert
    return ParameterCount(shared + experts, shared + ffn.top_k * expert, 0, experts)


def count_flops(config: ModelConfig, seq_len: int) -> FlopCount:
    """FLOPs per token of training on rows of `seq_len` tokens; the backward pass has two products for each forward one."""
    dim = config.dim
    keys = min(seq_len, config.window or seq_len)
    scores_and_mix = 2 * keys * config.num_heads * config.size_per_head
    weights = _vocab(config) * dim
    for layer in range(config.num_layers):
        ffn = config.ffn_at(layer)
        weights += _attention_weights(config) + scores_and_mix
        if isinstance(ffn, MoEFFNConfig):
            weights += (ffn.top_k + ffn.shared_experts) * 3 * dim * ffn.hidden_dim + router_weights(dim, ffn)
            weights += ffn.shared_gate * dim
        else:
            weights += 3 * dim * ffn.hidden_dim
    return FlopCount(forward=2 * weights, backward=4 * weights)


def _attention_weights(config: ModelConfig) -> int:
    width = config.size_per_head
    return config.dim * width * (2 * config.num_heads + 2 * config.kv_heads)


def router_weights(dim: int, ffn: MoEFFNConfig) -> int:
    """Parameters of one router."""
    match ffn.router:
        case HashRouterConfig() | RandomRouterConfig():
            return 0
        case NoisyTopKRouterConfig():
            return 2 * dim * ffn.num_experts
        case HierarchicalRouterConfig(groups=groups):
            return 2 * dim * (ffn.num_experts + groups)
        case _:
            return dim * ffn.num_experts
