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
from moelm.plan.strategy import FP32_BYTES, Strategy
from moelm.plan.traffic import Collective, Traffic, step_collectives, total_traffic
from moelm.plan.update import slowest_update_flops
from moelm.plan.weights import count_weights

GPUS_PER_MACHINE = 8
USABLE_MEMORY = 0.9
"""Fraction of a GPU's memory that a plan may use; the rest is for fragmentation and libraries."""
COMPUTE_EFFICIENCY = 0.55
"""Fraction of peak FLOP/s while computation does not wait for communication."""
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
            **self.strategy.dims._asdict(),
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
            f"{device.peak_bf16 / 1e12:,.0f} TFLOP/s in bf16, of which {COMPUTE_EFFICIENCY:.0%} is reached while "
            "computation does not wait for communication",
            f"{GPUS_PER_MACHINE} GPUs per machine; {device.link / 1e9:,.0f} GB/s between them and "
            f"{device.network / 1e9:,.0f} GB/s per GPU to other machines, of which collectives reach {LINK_EFFICIENCY:.0%}",
            "no idle time between kernels, which is not negligible for small models",
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

    For each layout, the fastest strategy that fits is chosen: activation checkpointing as in the config or more, and the
    config's micro-batch or one row.

    Raises:
        MoelmError: an unknown device, or a batch that the GPUs cannot share equally.
    """
    if device not in DEVICES:
        raise MoelmError(f"The device {device!r} is unknown; one of {', '.join(DEVICES)} is expected.")
    check_batch(config, gpus)
    candidates = [_best_candidate(config, dims, DEVICES[device]) for dims in possible_dims(config, gpus)]
    return Plan(gpus, device, sorted(candidates, key=_sort_key))


def possible_dims(config: RunConfig, gpus: int) -> Iterator[ParallelDims]:
    """All dims whose product is the number of GPUs and which the model allows."""
    divisors = [number for number in range(1, gpus + 1) if gpus % number == 0]
    for ep in divisors:
        for shard in divisors:
            if (
                gpus % (ep * shard) == 0
                and check_model(config, dims := ParallelDims(gpus // (ep * shard), shard, ep)) is None
            ):
                yield dims


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
        for micro_batch_rows in dict.fromkeys((config.micro_batch_rows(dims.size), 1))
        for checkpointing in modes
    ]
    return min(candidates, key=_sort_key)


def _estimate(config: RunConfig, strategy: Strategy, device: Device) -> Candidate:
    dims, memory = strategy.dims, estimate_memory(config, strategy)
    collectives = list(step_collectives(config, strategy))
    seconds = {"all_to_all": 0.0, "optimizer": 0.0, "overlapped": 0.0}
    for each in collectives:
        seconds[each.kind if each.kind in seconds else "overlapped"] += transfer_seconds(each, device)
    flops = count_flops(config.model, config.data.seq_len)
    executed = flops.training + flops.forward * strategy.needs_extra_forward(config) + _recomputed_flops(config, strategy)
    tokens = config.train.batch_tokens / dims.size
    flops_per_s = device.peak_bf16 * COMPUTE_EFFICIENCY
    passes = max(tokens * executed / flops_per_s, seconds["overlapped"]) + seconds["all_to_all"]
    # Weights and moments are read and written, gradients read.
    trained = count_weights(config, lambda weight: weight.is_trained(config.optim)).per_process(dims)
    moved = 3 * FP32_BYTES * trained + 2 * memory.optimizer
    update = moved / device.memory_bandwidth + slowest_update_flops(config, dims) / flops_per_s + seconds["optimizer"]
    step = passes + update
    fits = memory.total <= USABLE_MEMORY * device.memory
    mfu = tokens * flops.training / (step * device.peak_bf16)
    return Candidate(strategy, memory, total_traffic(collectives), fits, step, mfu)


def _recomputed_flops(config: RunConfig, strategy: Strategy) -> float:
    """FLOPs per token that activation checkpointing adds."""
    if strategy.checkpointing == "none":
        return 0.0
    if strategy.checkpointing == "full":
        return count_flops(config.model, config.data.seq_len).forward
    flops = 0
    for layer in range(config.model.num_layers):
        ffn = config.model.ffn_at(layer)
        active_experts = ffn.top_k + ffn.shared_experts if isinstance(ffn, MoEFFNConfig) else 1
        flops += 2 * 2 * active_experts * config.model.dim * ffn.hidden_dim
    return flops
