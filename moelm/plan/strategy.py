"""One way to run a config."""

from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.distributed.parallel_dims import ParallelDims

FP32_BYTES = 4
BF16_BYTES = 2


class Strategy(NamedTuple):
    """Parallel dims, activation checkpointing, micro-batch size and precision."""

    dims: ParallelDims
    checkpointing: str
    """Value of `parallel.activation_checkpointing`."""
    micro_batch_rows: int
    """Rows in one forward pass of one process."""
    bf16: bool
    """Whether matrix products are in bfloat16."""

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of a matrix product's input or output."""
        return BF16_BYTES if self.bf16 else FP32_BYTES

    def gathered_bytes(self, config: RunConfig) -> int:
        """Bytes of one gathered parameter."""
        return FP32_BYTES if config.parallel.param_dtype == "fp32" else self.activation_bytes

    def num_micro_batches(self, config: RunConfig) -> int:
        """Micro-batches of one process in one step."""
        return config.batch_rows // self.dims.size // self.micro_batch_rows

    def needs_extra_forward(self, config: RunConfig) -> bool:
        """Whether the balance losses need the routing of the whole batch, which a first forward pass then computes."""
        ffn = config.model.ffn
        return isinstance(ffn, MoEFFNConfig) and self.num_micro_batches(config) > 1 and ffn.balance.needs_whole_batch
