"""The layouts that a number of GPUs allows, what each would cost, and which is best.

The time is a model, not a measurement: its assumptions are the constants here and are printed with it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from moelm.config import MoEFFNConfig, RunConfig
from moelm.distributed.layout import Layout, check_batch, check_model
from moelm.errors import MoelmError
from moelm.hardware import DEVICES, Device
from moelm.model.counting import count_flops
from moelm.plan.memory import FLOAT32, Memory, Setting, estimate_memory, weights_of
from moelm.plan.traffic import Message, Traffic, ahead, messages

MACHINE = 8
"""GPUs of one machine."""
USABLE = 0.9
"""Part of a GPU's memory that a plan may fill; the rest goes to gaps, libraries and the unforeseen."""
COMPUTE = 0.55
"""Part of the peak that a step reaches where nothing waits for messages."""
LINKS = 0.75
"""Part of a link's bandwidth that collectives reach."""
CHECKPOINTING = ("none", "selective", "full")


class Choice(NamedTuple):
    """One setting and what it would cost."""

    setting: Setting
    memory: Memory
    traffic: Traffic
    fits: bool
    step_s: float
    """Seconds of one optimizer step."""
    mfu: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.setting.layout._asdict(),
            "activation_checkpointing": self.setting.checkpointing,
            "micro_batch_rows": self.setting.micro_rows,
            "fits": self.fits,
            "step_s": self.step_s,
            "mfu": self.mfu,
            "memory_bytes": self.memory.as_dict(),
            "bytes_per_step": self.traffic._asdict(),
        }


class Plan(NamedTuple):
    """All choices, best first; those that do not fit come last."""

    gpus: int
    device: str
    choices: list[Choice]

    @property
    def best(self) -> Choice:
        """The fastest that fits, or the smallest if none does."""
        return self.choices[0]

    @property
    def assumptions(self) -> list[str]:
        """What the times rest on, in sentences."""
        kind = DEVICES[self.device]
        return [
            f"{kind.peak_bf16 / 1e12:,.0f} TFLOP/s in bf16, of which {COMPUTE:.0%} is reached where nothing waits",
            f"{MACHINE} GPUs a machine; {kind.link / 1e9:,.0f} GB/s between them and {kind.network / 1e9:,.0f} GB/s a GPU "
            f"to other machines, of which collectives reach {LINKS:.0%}",
            "no time between operations, which small models do lose",
            "weights and gradients travel while layers compute; tokens on their way to experts are waited for",
            f"even routing; a plan fits if it fills at most {USABLE:.0%} of {kind.memory / 1e9:,.0f} GB",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gpus": self.gpus,
            "device": self.device,
            "best": self.best.as_dict(),
            "layouts": [choice.as_dict() for choice in self.choices],
            "assumptions": self.assumptions,
        }


def make_plan(config: RunConfig, gpus: int, device: str) -> Plan:
    """Look at every layout of a config, whose vocabulary is known, on so many GPUs.

    For each layout the fastest that fits is taken, of the activation checkpointing that the config asks for or more, with
    the micro-batch of the config or of one row.

    Raises:
        MoelmError: an unknown device, or GPUs among which the batch cannot be shared.
    """
    if device not in DEVICES:
        raise MoelmError(f"There is no device {device!r} in the table; it knows {', '.join(DEVICES)}.")
    check_batch(config, gpus)
    kind = DEVICES[device]
    choices = [_best_of_layout(config, layout, kind) for layout in layouts(config, gpus)]
    return Plan(gpus, device, sorted(choices, key=_rank))


def _rank(choice: Choice) -> tuple[bool, float]:
    return not choice.fits, choice.step_s if choice.fits else float(choice.memory.total)


def layouts(config: RunConfig, gpus: int) -> Iterator[Layout]:
    """Every way to write the number of GPUs as a product that the model allows."""
    divisors = [number for number in range(1, gpus + 1) if gpus % number == 0]
    for ep in divisors:
        for shard in divisors:
            if gpus % (ep * shard) == 0 and check_model(config, layout := Layout(gpus // (ep * shard), shard, ep)) is None:
                yield layout


def _best_of_layout(config: RunConfig, layout: Layout, kind: Device) -> Choice:
    wanted = config.parallel.activation_checkpointing
    low = config.train.precision != "float32"
    rows = config.micro_batch_rows(layout.size)
    tried = []
    for micro_rows in dict.fromkeys((rows, 1)):
        for checkpointing in CHECKPOINTING[CHECKPOINTING.index(wanted) :]:
            tried.append(_weigh(config, Setting(layout, checkpointing, micro_rows, low), kind))
    return min(tried, key=_rank)


def _weigh(config: RunConfig, setting: Setting, kind: Device) -> Choice:
    memory, sent = estimate_memory(config, setting), list(messages(config, setting))
    useful = count_flops(config.model, config.data.seq_len)
    tokens = config.train.batch_tokens / setting.layout.size
    work = useful.training + useful.forward * ahead(config, setting) + _again(config, setting)
    compute = tokens * work / (kind.peak_bf16 * COMPUTE)
    layout = setting.layout
    waiting = sum(_seconds(message, kind) for message in sent if message.collective == "all_to_all")
    hidden = sum(_seconds(message, kind) for message in sent if message.collective != "all_to_all")
    counted = weights_of(config)
    own = (counted.root + counted.trunk) / layout.trunk[1] + counted.experts / (layout.ep * layout.dp_shard)
    update = 7 * FLOAT32 * own / kind.memory_bandwidth  # weight and moments read and written, gradient read
    step = max(compute, hidden) + waiting + update
    fits = memory.total <= USABLE * kind.memory
    return Choice(setting, memory, Traffic.of(sent), fits, step, tokens * useful.training / (step * kind.peak_bf16))


def _seconds(message: Message, kind: Device) -> float:
    """A group inside one machine has its links, one over machines a network card for each GPU.

    A ring could use the cards of all its members in a machine; what is published of FSDP on 128 H100s (docs/scaling.md)
    is what one card gives.
    """
    over_machines = (message.size - 1) * message.stride >= MACHINE
    return message.bytes / (LINKS * (kind.network if over_machines else kind.link))


def _again(config: RunConfig, setting: Setting) -> float:
    """FLOPs per token that are done again rather than remembered."""
    forward = count_flops(config.model, config.data.seq_len).forward
    if setting.checkpointing != "selective":
        return forward if setting.checkpointing == "full" else 0.0
    hidden = 0
    for layer in range(config.model.num_layers):
        ffn = config.model.ffn_at(layer)
        visited = ffn.top_k + ffn.shared_experts if isinstance(ffn, MoEFFNConfig) else 1
        hidden += 2 * 2 * visited * config.model.dim * ffn.hidden_dim
    return hidden
