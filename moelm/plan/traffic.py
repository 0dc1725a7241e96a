"""What one process sends for one optimizer step: bytes, by which collective, to whom.

Rings and pairwise exchanges: a gather or scatter over n processes sends (n-1)/n of the whole, a sum twice that.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.plan.memory import FLOAT32, Setting, weights_of


class Message(NamedTuple):
    """All that one process sends by one collective in one group of processes."""

    collective: str
    """A field of `Traffic`."""
    bytes: float
    size: int
    """Processes in the group."""
    stride: int
    """Ranks from one of them to the next."""


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

    @classmethod
    def of(cls, messages: list[Message]) -> "Traffic":
        """The messages' sums."""
        return cls(*(round(sum(m.bytes for m in messages if m.collective == name)) for name in cls._fields))


def messages(config: RunConfig, setting: Setting) -> Iterator[Message]:
    """What one process sends; groups of one send nothing."""
    layout, counted = setting.layout, weights_of(config)
    wide = FLOAT32 if config.parallel.param_dtype == "float32" or not setting.low else 2
    reduced = FLOAT32 if config.parallel.reduce_dtype == "float32" else 2
    micro_batches = config.batch_rows // layout.size // setting.micro_rows
    # What is kept after a forward pass serves the next pass too.
    gathers = micro_batches * (2 + ahead(config, setting) if config.parallel.reshard_after_forward else 1)
    # A layer that repeats is gathered at each visit; its gradient is summed once.
    visits = config.model.num_layers // config.model.layers_built if config.parallel.reshard_after_forward else 1
    sums = micro_batches if layout.dp_shard > 1 else 1
    copies, shared = layout.trunk
    trunk, experts = counted.trunk, counted.experts // layout.ep
    if layout.ep == 1:
        trunk, experts = trunk + experts, 0
    # The root travels in float32. Groups: bytes of weights, their number, copies and shares, and how far apart shares are.
    for weights, number, replicas, shares, apart in (
        (FLOAT32 * counted.root + visits * wide * trunk, counted.root + trunk, copies, shared, 1),
        (visits * wide * experts, experts, layout.dp_replicate, layout.dp_shard, layout.ep),
    ):
        yield Message("all_gather", gathers * _part(shares) * weights, shares, apart)
        yield Message("reduce_scatter", sums * reduced * _part(shares) * number, shares, apart)
        yield Message("all_reduce", 2 * sums * reduced * _part(replicas) * number / shares, replicas, apart * shares)
    yield Message("all_to_all", _part(layout.ep) * _travelling(config, setting) * micro_batches, layout.ep, 1)


def _part(size: int) -> float:
    return (size - 1) / size


def ahead(config: RunConfig, setting: Setting) -> bool:
    """Whether a forward pass goes ahead to know the routing of a batch that is cut up."""
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig) or setting.micro_rows * setting.layout.size >= config.batch_rows:
        return False
    return ffn.balance.needs_whole_batch


def _travelling(config: RunConfig, setting: Setting) -> int:
    """Bytes of a micro-batch's rows on all their ways, those that stay here included."""
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig):
        return 0
    layers = len(config.model.sparse_layers)
    rows = setting.micro_rows * config.data.seq_len * ffn.top_k
    ways = 4 + 2 * ahead(config, setting) + 2 * (setting.checkpointing == "full")
    return layers * ways * rows * config.model.dim * (2 if setting.low else FLOAT32)
