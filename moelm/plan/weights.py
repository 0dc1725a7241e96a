"""The parameters of a model by shape, role and sharding, from a config alone."""

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

from moelm.config import ModelConfig, MoEFFNConfig, OptimConfig, RunConfig
from moelm.distributed.parallel_dims import ParallelDims, padded_size, stack_shard_dim
from moelm.model.flops import router_weights
from moelm.model.roles import Role
from moelm.train.parameter_groups import optimizer_of_role


class Weight(NamedTuple):
    """One parameter."""

    section: Literal["root", "dense", "routers", "experts"]
    """What it is sharded with: see `WeightCount`."""
    role: Role
    shape: tuple[int, ...]
    """Three dimensions: a stack of experts."""
    heads: int = 1
    """Of a query, key or value projection."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def gathered_size(self, dims: ParallelDims) -> int:
        """Number of elements when it is gathered: FSDP pads the sharded dimension to a multiple of the shards."""
        if self.section == "routers" or (self.section == "experts" and dims.ep > 1):
            return self.size  # not sharded by FSDP, or only where it divides evenly
        shards = dims.dense_mesh[1]
        dim = stack_shard_dim(self.shape[0], self.shape[1], shards) if self.section == "experts" else 0
        return self.size // self.shape[dim] * padded_size(self.shape[dim], shards)

    def is_trained(self, optim: OptimConfig) -> bool:
        """Whether its role is not frozen."""
        trained: bool = getattr(optim.groups, self.role).lr > 0
        return trained

    def uses_muon(self, optim: OptimConfig) -> bool:
        """Whether Muon updates it."""
        return optimizer_of_role(optim, self.role) == "muon" and self.is_trained(optim)

    def uses_adamw(self, optim: OptimConfig) -> bool:
        """Whether AdamW updates it."""
        return self.is_trained(optim) and not self.uses_muon(optim)


class WeightCount(NamedTuple):
    """Numbers of elements that are sharded differently."""

    root: int
    """Embedding, last norm and head: FSDP's root module."""
    dense: int
    """All layers without routers and routed experts."""
    routers: int
    """The routers of all layers, which every process holds completely."""
    experts: int
    """The routed experts of all layers."""

    def per_process(self, dims: ParallelDims) -> int:
        """Of one process's shards, the mean over processes."""
        sharded = (self.root + self.dense) // dims.dense_mesh[1] + self.experts // (dims.ep * dims.dp_shard)
        return sharded + self.routers


def model_weights(config: RunConfig) -> Counter[Weight]:
    """How many parameters of each kind the model of a config with a vocabulary size has."""
    return _model_weights(config.model).copy()


@cache  # a plan asks for them thousands of times
def _model_weights(model: ModelConfig) -> Counter[Weight]:
    dim, width = model.dim, model.size_per_head
    embedding = (model.vocab_size or 0, dim)
    weights = Counter([Weight("root", "embedding", embedding), Weight("root", "norm", (dim,))])
    if not model.tie_embeddings:
        weights[Weight("root", "head", embedding)] += 1
    for layer in range(model.num_unique_layers):
        weights[Weight("dense", "norm", (dim,))] += (4 if model.sandwich_norm else 2) + model.attention_output_bias
        for heads in (model.num_heads, model.kv_heads):
            norm = width * heads if model.qk_norm == "all_heads" else width
            weights[Weight("dense", "norm", (norm,))] += bool(model.qk_norm)
        for heads in (model.num_heads, model.kv_heads, model.kv_heads):
            weights[Weight("dense", "attention", (heads * width, dim), heads)] += 1
            weights[Weight("dense", "norm", (heads * width,))] += model.qkv_bias
        weights[Weight("dense", "attention", (dim, model.num_heads * width))] += 1
        ffn = model.ffn_at(layer)
        hidden = ffn.hidden_dim
        if isinstance(ffn, MoEFFNConfig):
            role: Role = "experts" if ffn.num_experts > 1 else "ffn"
            weights[Weight("routers", "router", (router_weights(dim, ffn),))] += 1
            weights[Weight("experts", role, (ffn.num_experts, hidden, dim))] += 2
            weights[Weight("experts", role, (ffn.num_experts, dim, hidden))] += 1
            hidden *= ffn.shared_experts  # one wide block
            weights[Weight("dense", "router", (1, dim))] += ffn.shared_gate
        weights[Weight("dense", "ffn", (hidden, dim))] += 2
        weights[Weight("dense", "ffn", (dim, hidden))] += 1
    return Counter({weight: number for weight, number in weights.items() if number * weight.size})


def count_weights(
    config: RunConfig, included: Callable[[Weight], bool] = lambda weight: True, gathered: ParallelDims | None = None
) -> WeightCount:
    """The number of elements in each section.

    Args:
        gathered: dims whose shards are put together, padding included; None counts the elements themselves.
    """
    counts = dict.fromkeys(WeightCount._fields, 0)
    for weight, number in model_weights(config).items():
        if included(weight):
            counts[weight.section] += number * (weight.gathered_size(gathered) if gathered else weight.size)
    return WeightCount(**counts)
