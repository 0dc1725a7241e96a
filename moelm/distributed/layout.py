"""How many processes do what: plain arithmetic on a config, so that a plan can be made without any of them."""

from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.errors import MoelmError


class Layout(NamedTuple):
    """Sizes of the three directions of the mesh, the last one being that of neighbours on a machine."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        """Processes."""
        return self.dp_replicate * self.dp_shard * self.ep

    @property
    def trunk(self) -> tuple[int, int]:
        """Copies of everything but the experts, and over how many processes each is shared.

        The trunk is data-parallel over all processes (Shazeer et al. 2017, section 3.1). Where weights are shared at all,
        those that share experts share the trunk too.
        """
        return (self.size, 1) if self.dp_shard == 1 else (self.dp_replicate, self.dp_shard * self.ep)

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} ep={self.ep}"


def resolve_layout(config: RunConfig, processes: int) -> Layout:
    """The config's layout on so many processes, with what is `auto` filled in.

    Raises:
        MoelmError: it does not fit the processes, the batch or the model.
    """
    wanted = config.parallel
    rest = processes // wanted.ep
    replicate, shard = wanted.dp_replicate, wanted.dp_shard
    if shard == "auto":
        copies = 1 if replicate == "auto" else replicate
        shard = rest // copies or 1
    if replicate == "auto":
        replicate = rest // shard
    layout = Layout(replicate, shard, wanted.ep)
    if layout.size != processes:
        asked = f"dp_replicate={wanted.dp_replicate} dp_shard={wanted.dp_shard} ep={wanted.ep}"
        raise MoelmError(f"parallel asks for {asked}, whose product cannot be the number of processes, {processes}.")
    check_batch(config, processes)
    if (problem := check_model(config, layout)) is not None:
        raise MoelmError(problem)
    return layout


def check_batch(config: RunConfig, processes: int) -> None:
    """Refuse a batch of which so many processes cannot have equal parts."""
    if config.batch_rows % processes:
        raise MoelmError(
            f"train.batch_tokens is {config.train.batch_tokens}, or {config.batch_rows} rows of data.seq_len = "
            f"{config.data.seq_len}; {processes} processes cannot have equal parts of them."
        )


def check_model(config: RunConfig, layout: Layout) -> str | None:
    """Why a model cannot be spread like this, as a sentence; None if it can."""
    ffn = config.model.ffn
    if layout.ep == 1:
        return None
    if not isinstance(ffn, MoEFFNConfig):
        return f"parallel.ep is {layout.ep}, but model.ffn is dense, without experts to deal out; 1 is expected."
    if ffn.num_experts % layout.ep:
        return f"parallel.ep is {layout.ep}, which does not divide model.ffn.num_experts = {ffn.num_experts}."
    for name, width in (("model.dim", config.model.dim), ("model.ffn.hidden_dim", ffn.hidden_dim)):
        if width % layout.dp_shard:
            return (
                f"parallel.dp_shard is {layout.dp_shard}, which does not divide {name} = {width}; "
                "with parallel.ep above 1 an expert's matrices are cut evenly."
            )
    return None
