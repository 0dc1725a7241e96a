"""Bytes that one process sends for one optimizer step, by collective.

Rings and pairwise exchanges: a gather or scatter over n processes sends (n-1)/n of the whole, a sum twice that.
"""

from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.plan.memory import FLOAT32, Setting, weights_of


class Traffic(NamedTuple):
    """Bytes sent by one process in one step."""

    all_gather: int
    """Weights, where they are shared."""
    reduce_scatter: int
    """Gradients of shared weights."""
    all_reduce: int
    """Gradients of whole copies."""
    all_to_all: int
    """Tokens to experts and back, and their gradients."""


def estimate_traffic(config: RunConfig, setting: Setting) -> Traffic:
    """What one process sends."""
    layout, counted = setting.layout, weights_of(config)
    wide = FLOAT32 if config.parallel.param_dtype == "float32" or not setting.low else 2
    reduced = FLOAT32 if config.parallel.reduce_dtype == "float32" else 2
    micro_batches = config.batch_rows // layout.size // setting.micro_rows
    copies, shared = layout.trunk
    trunk, experts = counted.root + counted.trunk, counted.experts // layout.ep
    if layout.ep == 1:
        trunk, experts = trunk + experts, 0
    passes = 1 + config.parallel.reshard_after_forward + ahead(config, setting)
    gathers = micro_batches * passes
    sums = micro_batches if layout.dp_shard > 1 else 1

    def part(size: int) -> float:
        return (size - 1) / size

    shared_bytes = part(shared) * trunk + part(layout.dp_shard) * experts
    copied = part(copies) * trunk / shared + part(layout.dp_replicate) * experts / layout.dp_shard
    return Traffic(
        all_gather=round(gathers * wide * shared_bytes),
        reduce_scatter=round(sums * reduced * shared_bytes),
        all_reduce=round(2 * sums * reduced * copied),
        all_to_all=round(part(layout.ep) * _travelling(config, setting) * micro_batches),
    )


def ahead(config: RunConfig, setting: Setting) -> bool:
    """Whether a forward pass goes ahead to know the routing of a batch that is cut up."""
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig) or setting.micro_rows * setting.layout.size >= config.batch_rows:
        return False
    balance = ffn.balance
    return balance.scope == "global" and (balance.aux > 0 or balance.importance > 0 or balance.load > 0)


def _travelling(config: RunConfig, setting: Setting) -> int:
    """Bytes of a micro-batch's rows on all their ways, those that stay here included."""
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig):
        return 0
    layers = sum(isinstance(config.model.ffn_at(layer), MoEFFNConfig) for layer in range(config.model.num_layers))
    rows = setting.micro_rows * config.data.seq_len * ffn.top_k
    ways = 4 + 2 * ahead(config, setting) + 2 * (setting.checkpointing == "full")
    return layers * ways * rows * config.model.dim * (2 if setting.low else FLOAT32)
