"""What is timed: a training step, or the continuation of prompts; a job is a function that returns its phases' seconds.

A step is what training does: forward, loss with the balance losses, backward, clipping, fused AdamW, on random tokens of
the config's batch; the peers are trained by the same loop. Generation is greedy, against a key/value cache.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.bench.contestants import Contestant
from moelm.bench.models import build_own, build_peer, own_loss, peer_loss, random_batch, shape_of
from moelm.generate import Sampling, generate_tokens
from moelm.hardware import dtype_of, pick_device
from moelm.model import count_flops
from moelm.train.optim import build_optimizer, clip_gradients, gradient_squares

Phases = dict[str, float]
Job = Callable[[], Phases]


class Work(NamedTuple):
    """What every contestant does."""

    prompts: int = 0
    """Prompts continued at once; 0 for training steps."""
    prompt_tokens: int = 128
    new_tokens: int = 64


def build_job(entry: Contestant, work: Work) -> tuple[Job, int, int]:
    """A contestant's job, its tokens, and its FLOPs (0 for generation, which is bound by memory)."""
    if work.prompts:
        return (_peer_generation if entry.peer else _own_generation)(entry, work), work.prompts * work.new_tokens, 0
    config = entry.config
    tokens = config.train.batch_tokens
    return training_step(entry), tokens, tokens * count_flops(shape_of(config), config.data.seq_len).training


def training_step(entry: Contestant) -> Job:
    """One optimizer step."""
    config = entry.config
    device = pick_device()
    low = dtype_of(config.train.precision, device) == torch.bfloat16
    batch = random_batch(config).to(device)
    if entry.peer:
        model: torch.nn.Module = build_peer(config, config.data.seq_len, train=True).to(device).train()
        loss = peer_loss(model, batch)
    else:
        own = build_own(config).to(device)
        model, loss = own, own_loss(own, config, batch)
    optimizer = build_optimizer(model, config.optim)

    def step() -> Phases:
        clock = _Clock(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            value = loss()
        clock.lap("forward")
        value.backward()  # type: ignore[no-untyped-call]
        clock.lap("backward")
        clip_gradients(model.parameters(), gradient_squares(model.parameters()), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("update")
        return clock.phases

    return step


def _prompts(entry: Contestant, work: Work) -> Tensor:
    vocab_size = shape_of(entry.config).vocab_size or 0
    return torch.randint(0, vocab_size, (work.prompts, work.prompt_tokens), generator=torch.Generator().manual_seed(0))


def _own_generation(entry: Contestant, work: Work) -> Job:
    device = pick_device()
    model = build_own(entry.config).to(device, dtype_of(entry.config.train.precision, device)).eval()
    model.config = model.config.model_copy(update={"max_seq_len": work.prompt_tokens + work.new_tokens + 1})
    prompts = _prompts(entry, work).tolist()
    sampling = Sampling(max_new_tokens=work.new_tokens + 1, temperature=0)

    def generate() -> Phases:
        clock = _Clock(device)
        tokens: Iterator[list[int]] = generate_tokens(model, prompts, sampling, 0)
        next(tokens)
        clock.lap("prefill")
        for _ in tokens:
            pass
        clock.lap("decode")
        return clock.phases

    return generate


def _peer_generation(entry: Contestant, work: Work) -> Job:
    device = pick_device()
    positions = work.prompt_tokens + work.new_tokens + 1
    model: Any = build_peer(entry.config, positions, train=False).eval()
    model = model.to(device, dtype_of(entry.config.train.precision, device))
    prompts = _prompts(entry, work).to(device)

    def generate() -> Phases:
        clock = _Clock(device)
        for phase, tokens in (("prefill", 1), ("all", work.new_tokens + 1)):
            model.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            clock.lap(phase)
        phases = clock.phases
        return {"prefill": phases["prefill"], "decode": phases["all"] - phases["prefill"]}

    return generate


class _Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phases = device, Phases()
        self.started = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.phases[phase] = now - self.started
        self.started = now
