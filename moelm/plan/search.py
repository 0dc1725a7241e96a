"""All layouts of a config on a number of GPUs, their estimated cost, and the fastest.

The step time is a model, not a measurement; its constants are defined here and printed with every plan.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.distributed.parallel_dims import ParallelDims, check_batch, check_model
from moelm.errors import MoelmError
from moelm.hardware import DEVICES, Device
from moelm.model.flops import count_flops
from moelm.plan.memory import Memory, estimate_memory
from moelm.plan.passes import activation_traffic, cast_traffic, small_operations, update_traffic
from moelm.plan.strategy import Strategy
from moelm.plan.traffic import Collective, Traffic, step_collectives, total_traffic
from moelm.plan.update import slowest_update_flops

GPUS_PER_MACHINE = 8
USABLE_MEMORY = 0.9
"""Fraction of a GPU's memory that a plan may use; the rest is for fragmentation and libraries."""
COMPUTE_EFFICIENCY = 0.65
"""Fraction of peak FLOP/s that large matrix products reach."""
TILE_COSTS = 250, 400
"""An expert's products take 1 + first / dim + second / hidden_dim times as long as large ones with the same FLOPs; with all
other terms, these give the times of the shapes of `scripts/bench_gpu.py` that were estimated kernel by kernel."""
MEMORY_EFFICIENCY = 0.85
"""Fraction of the memory's bandwidth that passes over it reach."""
LAUNCH_S = 5e-6
"""Seconds for which the host is busy with a small operation."""
LINK_EFFICIENCY = 0.75
"""Fraction of a link's bandwidth that collectives reach."""
CHECKPOINTING_MODES = ("none", "selective", "full")
"""By memory, largest first."""


class Candidate(NamedTuple):
    """One strategy and its estimated cost."""

    strategy: Strategy
    memory: Memory
    traffic: Traffic
    fits: bool
    step_s: float
    """Seconds of one optimizer step."""
    mfu: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.strategy.dims.as_settings(),
            "activation_checkpointing": self.strategy.checkpointing,
            "micro_batch_rows": self.strategy.micro_batch_rows,
            "fits": self.fits,
            "step_s": self.step_s,
            "mfu": self.mfu,
            "memory_bytes": self.memory.as_dict(),
            "bytes_per_step": self.traffic._asdict(),
        }


class Plan(NamedTuple):
    """One candidate per layout: those that fit, fastest first, then the others, smallest first."""

    gpus: int
    device: str
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate:
        """The fastest that fits, or the smallest if none does."""
        return self.candidates[0]

    @property
    def assumptions(self) -> list[str]:
        """What the estimates are based on, as phrases."""
        device = DEVICES[self.device]
        return [
            f"{device.peak_bf16 / 1e12:,.0f} TFLOP/s in bf16, of which large products reach {COMPUTE_EFFICIENCY:.0%}; "
            f"those of experts take 1 + {TILE_COSTS[0]} / dim + {TILE_COSTS[1]} / hidden_dim times as long",
            f"{device.memory_bandwidth / 1e12:,.2f} TB/s of memory, of which passes over activations, weights, gradients "
            f"and moments reach {MEMORY_EFFICIENCY:.0%}; {LAUNCH_S * 1e6:.0f} microseconds for each small operation",
            f"{GPUS_PER_MACHINE} GPUs per machine; {device.link / 1e9:,.0f} GB/s between them and "
            f"{device.network / 1e9:,.0f} GB/s per GPU to other machines, of which collectives reach {LINK_EFFICIENCY:.0%}",
            "communication of weights and gradients overlaps with computation; that of tokens and the optimizer does not",
            f"even routing; a plan fits if it uses at most {USABLE_MEMORY:.0%} of {device.memory / 1e9:,.0f} GB",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gpus": self.gpus,
            "device": self.device,
            "best": self.best.as_dict(),
            "layouts": [candidate.as_dict() for candidate in self.candidates],
            "assumptions": self.assumptions,
        }


def make_plan(config: RunConfig, gpus: int, device: str) -> Plan:
    """Estimate every layout of a config, whose vocabulary size is known, on a number of GPUs.

    For each layout, the fastest strategy that fits is chosen: activation checkpointing as in the config or more, and any
    micro-batch if the config's is `auto` and results do not depend on it, otherwise the config's or one row.

    Raises:
        MoelmError: an unknown device, or a batch that the GPUs cannot share equally.
    """
    if device not in DEVICES:
        raise MoelmError(f"The device {device!r} is unknown; one of {', '.join(DEVICES)} is expected.")
    check_batch(config, gpus)
    candidates = [_best_candidate(config, dims, DEVICES[device]) for dims in possible_dims(config, gpus)]
    return Plan(gpus, device, sorted(candidates, key=_sort_key))


def possible_dims(config: RunConfig, gpus: int) -> Iterator[ParallelDims]:
    """All dims whose product is the number of GPUs and which the model allows.

    With expert parallelism, the other weights are sharded over as many GPUs as the experts, or over those of one machine.
    """
    divisors = [number for number in range(1, gpus + 1) if gpus % number == 0]
    for ep in divisors:
        for shard in divisors:
            if (
                gpus % (ep * shard) == 0
                and check_model(config, dims := ParallelDims(gpus // (ep * shard), shard, ep)) is None
            ):
                yield dims
                if ep > 1 and gpus % GPUS_PER_MACHINE == 0 and dims.dense_mesh[1] != GPUS_PER_MACHINE:
                    yield dims._replace(dense_shard=GPUS_PER_MACHINE)


def transfer_seconds(collective: Collective, device: Device) -> float:
    """Duration of a collective: over the machine's links, or, across machines, over one network card per GPU.

    A ring could use the cards of all its members on a machine, but published results of FSDP on 128 H100s (docs/scaling.md)
    agree with one card.
    """
    crosses_machines = (collective.group_size - 1) * collective.stride >= GPUS_PER_MACHINE
    return collective.bytes / (LINK_EFFICIENCY * (device.network if crosses_machines else device.link))


def _sort_key(candidate: Candidate) -> tuple[bool, float]:
    return not candidate.fits, candidate.step_s if candidate.fits else float(candidate.memory.total)


def _best_candidate(config: RunConfig, dims: ParallelDims, device: Device) -> Candidate:
    bf16 = config.train.precision != "fp32"
    modes = CHECKPOINTING_MODES[CHECKPOINTING_MODES.index(config.parallel.activation_checkpointing) :]
    candidates = [
        _estimate(config, Strategy(dims, checkpointing, micro_batch_rows, bf16), device)
        for micro_batch_rows in _micro_batches(config, dims.size)
        for checkpointing in modes
    ]
    return min(candidates, key=_sort_key)


def _micro_batches(config: RunConfig, gpus: int) -> list[int]:
    """Rows of the micro-batches that a plan may choose."""
    share, ffn = config.batch_rows // gpus, config.model.ffn
    fixed = isinstance(ffn, MoEFFNConfig) and ffn.depends_on_micro_batches
    if config.train.micro_batch_tokens == "auto" and not fixed:
        return [rows for rows in range(1, share + 1) if share % rows == 0]
    return list(dict.fromkeys((config.micro_batch_rows(gpus), 1)))


def _estimate(config: RunConfig, strategy: Strategy, device: Device) -> Candidate:
    dims, memory = strategy.dims, estimate_memory(config, strategy)
    collectives = list(step_collectives(config, strategy))
    seconds = {"all_to_all": 0.0, "optimizer": 0.0, "overlapped": 0.0}
    for each in collectives:
        seconds[each.kind if each.kind in seconds else "overlapped"] += transfer_seconds(each, device)
    flops = count_flops(config.model, config.data.seq_len)
    tokens = config.train.batch_tokens / dims.size
    flops_per_s = device.peak_bf16 * COMPUTE_EFFICIENCY
    bytes_per_s = device.memory_bandwidth * MEMORY_EFFICIENCY
    products = tokens * _executed_flops(config, strategy) / flops_per_s
    moved = activation_traffic(config, strategy) + cast_traffic(config, strategy)
    passes = max(products + moved / bytes_per_s, seconds["overlapped"]) + seconds["all_to_all"]
    update = update_traffic(config, strategy, memory.optimizer) / bytes_per_s + LAUNCH_S * small_operations(config)
    step = passes + update + slowest_update_flops(config, dims) / flops_per_s + seconds["optimizer"]
    fits = memory.total <= USABLE_MEMORY * device.memory
    mfu = tokens * flops.training / (step * device.peak_bf16)
    return Candidate(strategy, memory, total_traffic(collectives), fits, step, mfu)


def _executed_flops(config: RunConfig, strategy: Strategy) -> float:
    """FLOPs per token of all passes; those of experts count more, by as much as they are slower."""
    flops = count_flops(config.model, config.data.seq_len)
    executed: float = flops.training + flops.forward * strategy.needs_extra_forward(config)
    forwards = 3.0 + strategy.needs_extra_forward(config)
    if strategy.checkpointing == "full":
        executed += flops.forward
        forwards += 1
    elif strategy.checkpointing == "selective":
        executed += sum(_ffn_flops(config, layer) for layer in range(config.model.num_layers)) * 2 / 3
        forwards += 2 / 3  # all but the last of three equal products
    slower = sum(_ffn_flops(config, layer) * _tile_cost(config, layer) for layer in config.model.sparse_layers)
    return executed + forwards * slower


def _ffn_flops(config: RunConfig, layer: int) -> int:
    """Per token, of one layer's feed-forward blocks in a forward pass."""
    ffn = config.model.ffn_at(layer)
    active = ffn.top_k + ffn.shared_experts if isinstance(ffn, MoEFFNConfig) else 1
    return 3 * 2 * active * config.model.dim * ffn.hidden_dim


def _tile_cost(config: RunConfig, layer: int) -> float:
    """How much longer the products of experts take than large products, as a fraction of these."""
    of_dim, of_hidden = TILE_COSTS
    return of_dim / config.model.dim + of_hidden / config.model.ffn_at(layer).hidden_dim
