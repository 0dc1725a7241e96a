"""The sizes of the parallel dimensions, computed from a config alone."""

from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.errors import MoelmError

MAX_PADDING = 2.0
"""Expert weights are not padded to so many times their size or more."""


class ParallelDims(NamedTuple):
    """Sizes of the mesh dimensions; ranks of the last one are neighbors on a machine."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    dense_shard: int | None = None
    """Processes that shard all weights but the experts; None: those that shard the experts, if anything is sharded."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.dp_replicate * self.dp_shard * self.ep

    @property
    def dense_mesh(self) -> tuple[int, int]:
        """Replicas of all parameters but the experts, and the processes that shard each replica.

        These parameters are data-parallel over all processes (Shazeer et al. 2017, section 3.1).
        """
        if self.dense_shard is not None:
            return self.size // self.dense_shard, self.dense_shard
        return (self.size, 1) if self.dp_shard == 1 else (self.dp_replicate, self.dp_shard * self.ep)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards any weights."""
        return self.dp_shard > 1 or self.dense_mesh[1] > 1

    def as_settings(self) -> dict[str, int]:
        """The settings under `parallel` that give these sizes."""
        return {name: size for name, size in self._asdict().items() if size is not None}

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.as_settings().items())


def resolve_parallel_dims(config: RunConfig, processes: int) -> ParallelDims:
    """The config's parallel dimensions for this number of processes, with `auto` resolved.

    Raises:
        MoelmError: they do not fit the processes, the batch or the model.
    """
    parallel = config.parallel
    data_parallel = processes // parallel.ep
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    if shard == "auto":
        shard = data_parallel // (1 if replicate == "auto" else replicate) or 1
    if replicate == "auto":
        replicate = data_parallel // shard
    dims = ParallelDims(replicate, shard, parallel.ep, None if parallel.dense_shard == "auto" else parallel.dense_shard)
    if dims.size != processes:
        requested = f"dp_replicate={parallel.dp_replicate} dp_shard={parallel.dp_shard} ep={parallel.ep}"
        raise MoelmError(f"parallel requests {requested}, whose product cannot be the number of processes, {processes}.")
    if dims.dense_shard is not None and (dims.ep == 1 or processes % dims.dense_shard):
        reason = "parallel.ep is 1" if dims.ep == 1 else f"it does not divide the number of processes, {processes}"
        raise MoelmError(
            f"parallel.dense_shard is {dims.dense_shard}, but {reason}; auto is expected or, with parallel.ep above 1, a "
            "divisor of the processes."
        )
    check_batch(config, processes)
    if (problem := check_model(config, dims)) is not None:
        raise MoelmError(problem)
    return dims


def check_batch(config: RunConfig, processes: int) -> None:
    """Refuse a batch that this number of processes does not divide.

    Raises:
        MoelmError: it does not.
    """
    if config.batch_rows % processes:
        raise MoelmError(
            f"train.batch_tokens is {config.train.batch_tokens}, or {config.batch_rows} rows of data.seq_len = "
            f"{config.data.seq_len}, which {processes} processes cannot divide into equal shares."
        )


def check_model(config: RunConfig, dims: ParallelDims) -> str | None:
    """Why a model cannot be sharded like this, as a sentence; None if it can."""
    ffn = config.model.ffn
    if not isinstance(ffn, MoEFFNConfig):
        if dims.ep == 1:
            return None
        return f"parallel.ep is {dims.ep}, but model.ffn is dense and has no experts to shard; 1 is expected."
    if dims.ep == 1:
        if (padding := expert_padding(config, dims)) < MAX_PADDING:
            return None
        return (
            f"parallel.dp_shard is {dims.dp_shard}, which divides neither model.ffn.num_experts = {ffn.num_experts} nor "
            f"both model.dim = {config.model.dim} and model.ffn.hidden_dim = {ffn.hidden_dim}: the experts would be padded "
            f"to {padding:.3g} times their size. A divisor, or parallel.ep above 1, is expected."
        )
    if ffn.num_experts % dims.ep:
        return f"parallel.ep is {dims.ep}, which does not divide model.ffn.num_experts = {ffn.num_experts}."
    for name, width in (("model.dim", config.model.dim), ("model.ffn.hidden_dim", ffn.hidden_dim)):
        if width % dims.dp_shard:
            return (
                f"parallel.dp_shard is {dims.dp_shard}, which does not divide {name} = {width}; "
                "with parallel.ep above 1 an expert's matrices are divided evenly."
            )
    return None


def padded_size(size: int, shards: int) -> int:
    """The size of a dimension that FSDP shards: a multiple of the shards."""
    return -(-size // shards) * shards


def stack_shard_dim(experts: int, rows: int, shards: int) -> int:
    """The dimension along which FSDP shards a stack of matrices with so many rows: the first that divides evenly, or 0."""
    return int(experts % shards != 0 and rows % shards == 0)


def expert_padding(config: RunConfig, dims: ParallelDims) -> float:
    """How many times their size the expert weights have when they are gathered.

    Without expert parallelism FSDP shards the stacks; along dimension 0 it pads their experts to a multiple of the shards.
    """
    ffn, shards = config.model.ffn, dims.dense_mesh[1]
    if dims.ep > 1 or not isinstance(ffn, MoEFFNConfig):
        return 1.0
    padded = padded_size(ffn.num_experts, shards) / ffn.num_experts
    of_w1, of_w2 = (
        1.0 if stack_shard_dim(ffn.num_experts, rows, shards) else padded for rows in (ffn.hidden_dim, config.model.dim)
    )
    return (2 * of_w1 + of_w2) / 3  # w3 has the shape of w1
