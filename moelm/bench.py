"""Training steps timed against each other, each contestant in a process of its own, taking turns: what the machine does in
the meantime hits all of them alike, and each one's allocator and peak memory are its own.

A step is what training does: forward, loss with the balance losses, backward, clipping, fused AdamW, on random tokens of
the config's batch. The peers are the same shapes in Hugging Face's library, trained by the same loop.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moelm.config import ModelConfig, MoEFFNConfig, RunConfig, load_config
from moelm.data.loader import Batch
from moelm.errors import MoelmError
from moelm.hardware import keep_memory, peak_flops, peak_memory, pick_device, pick_dtype
from moelm.model import build_model, count_flops
from moelm.train.objective import balance_loss, layer_sums
from moelm.train.optim import build_optimizer, clip_gradients

WARMUP = 2
"""Rounds that are not counted: allocators and kernels settle."""


class Contestant(NamedTuple):
    """Whose training step is timed."""

    name: str
    config: RunConfig
    peer: bool = False
    """Hugging Face's model of the same shape."""
    keeps_memory: bool = True
    """Whether the allocator is told to keep freed memory, as moelm does; peers as their users run them do not."""


class Timing(NamedTuple):
    """What a contestant's steps took."""

    name: str
    seconds: list[float]
    tokens: int
    flops: int
    """Of one step, active experts only."""
    memory: int
    """Peak bytes of its process, or of its GPU."""
    peak_flops: float

    @property
    def median_s(self) -> float:
        """The middle step."""
        return median(self.seconds)

    def times(self, other: "Timing") -> float:
        """How many times as long as another's step: the median over rounds, where both met the same weather."""
        return median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "step_s": self.median_s,
            "tokens_per_s": self.tokens / self.median_s,
            "mfu": self.flops / self.median_s / self.peak_flops,
            "memory_peak_bytes": self.memory,
            "steps_s": self.seconds,
        }


def contestants(paths: Sequence[Path], overrides: Sequence[str], peers: bool) -> list[Contestant]:
    """One for each config and, with peers, two more: the library as its user runs it, and under moelm's allocator settings.

    Raises:
        MoelmError: a bad config, peers that are not installed, or a config that the peers cannot express.
    """
    configs = [load_config(path, overrides) for path in paths]
    entries = [Contestant(config.name, config) for config in configs]
    if peers:
        if find_spec("transformers") is None:
            raise MoelmError(
                "--peers needs the library transformers, which is not installed; moelm's extra `bench` brings it."
            )
        for config in configs:
            name = f"{config.name}, {'Mixtral' if isinstance(config.model.ffn, MoEFFNConfig) else 'Llama'} of transformers"
            entries.append(Contestant(name, config, peer=True, keeps_memory=False))
            entries.append(Contestant(f"{name}, same allocator", config, peer=True))
    return entries


def run_bench(entries: Sequence[Contestant], rounds: int, show: Callable[[str], None]) -> list[Timing]:
    """Time `rounds` training steps of each contestant, taking turns.

    Args:
        show: told how far the work has come.
    """
    # Before the contestants start: a peak measured beside them would be too low.
    device = pick_device()
    peaks = [peak_flops(device, pick_dtype(entry.config.train.precision, device)) for entry in entries]
    with _workers(entries) as pipes:
        about = [pipe.recv() for pipe in pipes]
        seconds: list[list[float]] = [[] for _ in pipes]
        for number in range(WARMUP + rounds):
            show(f"Round {number + 1} of {WARMUP + rounds} …")
            for pipe, taken in zip(pipes, seconds, strict=True):
                pipe.send(True)
                taken.append(pipe.recv())
        for pipe in pipes:
            pipe.send(False)
        memory = [pipe.recv() for pipe in pipes]
    return [
        Timing(entry.name, taken[WARMUP:], tokens, flops, used, peak)
        for entry, taken, (tokens, flops), used, peak in zip(entries, seconds, about, memory, peaks, strict=True)
    ]


@contextmanager
def _workers(entries: Sequence[Contestant]) -> Iterator[list["Connection[Any, Any]"]]:
    """Start one process for each contestant; they end with the block, however it ends."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for entry in entries:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(entry, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        yield pipes
    except EOFError:
        raise MoelmError("A contestant's process ended before its time; what it said is above.") from None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(entry: Contestant, pipe: "Connection[Any, Any]") -> None:
    """A contestant's process: build, tell the facts, then a step for every word, and at the end the peak memory."""
    if entry.keeps_memory:
        keep_memory()
    config = entry.config
    vocab_size = config.model.vocab_size or config.data.tokenizer.vocab_size
    shape = config.model.model_copy(update={"vocab_size": vocab_size})
    device = pick_device()
    dtype = pick_dtype(config.train.precision, device)
    batch = random_batch(config, vocab_size).to(device)
    build = build_peer if entry.peer else build_own
    model, loss = build(shape, config, batch)
    optimizer = build_optimizer(model, config.optim)
    tokens = batch.targets_BT.numel()
    pipe.send((tokens, tokens * count_flops(shape, config.data.seq_len).training))
    while pipe.recv():
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        clip_gradients(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started)
    pipe.send(peak_memory(device))


def random_batch(config: RunConfig, vocab_size: int) -> Batch:
    """A batch of the config's shape whose tokens are drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocab_size, (config.batch_rows, config.data.seq_len + 1), generator=generator)
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros_like(rows[:, 1:]))


def build_own(shape: ModelConfig, config: RunConfig, batch: Batch) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Our model on the batch's device, and its loss on that batch."""
    device = batch.tokens_BT.device
    model = build_model(shape, config.seed).to(device)
    wanted = config.train.compile
    forward = torch.compile(model) if wanted is True or (wanted == "auto" and device.type == "cuda") else model
    tokens = float(batch.targets_BT.numel())

    def loss() -> Tensor:
        output = forward(batch.tokens_BT, valid_BT=batch.valid_BT, targets_BT=batch.targets_BT)
        value: Tensor = output.losses.total / tokens
        if isinstance(shape.ffn, MoEFFNConfig):
            own = layer_sums(output.routings, batch)
            value = value + balance_loss(output.routings, own, None, batch, tokens, shape.ffn.balance)[0]
        return value

    return model, loss


def build_peer(shape: ModelConfig, config: RunConfig, batch: Batch) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Mixtral or Llama of the same shape, with the library's own defaults, and its loss on the batch."""
    transformers: Any = import_module("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn.hidden_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.size_per_head,
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": shape.tie_embeddings,
        "use_cache": False,
    }
    if isinstance(shape.ffn, MoEFFNConfig):
        experts = {"num_local_experts": shape.ffn.num_experts, "num_experts_per_tok": shape.ffn.top_k}
        wanted = transformers.MixtralConfig(**sizes, **experts, output_router_logits=True)
    else:
        wanted = transformers.LlamaConfig(**sizes)
    torch.manual_seed(config.seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(wanted).to(batch.tokens_BT.device).train()
    return model, partial(_peer_loss, model, batch)


def _peer_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch.tokens_BT, labels=batch.tokens_BT).loss
    return loss
