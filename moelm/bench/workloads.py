"""The timed work: a training step, or the generation of continuations.

A training step is forward pass, loss with balance losses, backward pass, gradient clipping and the optimizer's update, on
random tokens; peers are trained by the same loop with torch's fused AdamW. Generation is greedy, with a key/value cache.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.bench.models import (
    build_own,
    build_peer,
    load_max_over_mean,
    own_loss,
    own_update,
    peer_loss,
    peer_update,
    random_batch,
    resolve_model,
)
from moelm.bench.variants import BenchVariant
from moelm.hardware import dtype_of, pick_device, use_deterministic_kernels
from moelm.inference.generate import Sampling, generate_tokens
from moelm.model import count_flops

Phases = dict[str, float]
"""Seconds by phase."""


class Workload(NamedTuple):
    """What every variant does in one round."""

    prompts: int = 0
    """Batch size of generation; 0 for a training step."""
    prompt_tokens: int = 128
    new_tokens: int = 64


class TimedFunction(NamedTuple):
    """One variant's workload."""

    run: Callable[[], Phases]
    tokens: int
    """Per call; of generation, the decoded ones."""
    flops: int
    """Per call, of active parameters; 0 for generation, which is limited by memory bandwidth."""
    load: Callable[[], float | None] | None = None
    """`load_max_over_mean`; None where it is not known."""


def build_workload(variant: BenchVariant, workload: Workload) -> TimedFunction:
    """Build a variant's model on this process's device, and the function that times one round."""
    if workload.prompts:
        generation = _peer_generation if variant.peer else _own_generation
        return TimedFunction(generation(variant, workload), workload.prompts * workload.new_tokens, 0)
    return _training_step(variant)


def _training_step(variant: BenchVariant) -> TimedFunction:
    config = variant.config
    device = pick_device()
    if config.train.deterministic:
        use_deterministic_kernels(device)
    dtype = dtype_of(config.train.precision, device)
    batch = random_batch(config).to(device)
    if variant.peer:
        model = build_peer(config, config.data.seq_len, train=True).to(device).train()
        loss, update = peer_loss(model, batch, dtype), peer_update(model, config.optim)
        load = None
    else:
        own = build_own(config, variant.balanced).to(device)
        loss, update = own_loss(own, config, batch, dtype), own_update(own, config.optim, dtype)
        load = partial(load_max_over_mean, own, batch, dtype)

    def step() -> Phases:
        timer = _PhaseTimer(device)
        value = loss()
        timer.end("forward")
        value.backward()  # type: ignore[no-untyped-call]
        timer.end("backward")
        update()
        timer.end("update")
        return timer.phases

    tokens = config.train.batch_tokens
    return TimedFunction(step, tokens, tokens * count_flops(resolve_model(config), config.data.seq_len).training, load)


def _random_prompts(variant: BenchVariant, workload: Workload) -> Tensor:
    vocab_size = resolve_model(variant.config).vocab_size or 0
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (workload.prompts, workload.prompt_tokens), generator=generator)


def _own_generation(variant: BenchVariant, workload: Workload) -> Callable[[], Phases]:
    device = pick_device()
    model = build_own(variant.config).to(device, dtype_of(variant.config.train.precision, device)).eval()
    max_seq_len = workload.prompt_tokens + workload.new_tokens + 1
    model.config = model.config.model_copy(update={"max_seq_len": max_seq_len})
    prompts = _random_prompts(variant, workload).tolist()
    sampling = Sampling(max_new_tokens=workload.new_tokens + 1, temperature=0)

    def generate() -> Phases:
        timer = _PhaseTimer(device)
        tokens: Iterator[list[int]] = generate_tokens(model, prompts, sampling, 0)
        next(tokens)
        timer.end("prefill")
        for _ in tokens:
            pass
        timer.end("decode")
        return timer.phases

    return generate


def _peer_generation(variant: BenchVariant, workload: Workload) -> Callable[[], Phases]:
    device = pick_device()
    max_positions = workload.prompt_tokens + workload.new_tokens + 1
    model: Any = build_peer(variant.config, max_positions, train=False).eval()
    model = model.to(device, dtype_of(variant.config.train.precision, device))
    prompts = _random_prompts(variant, workload).to(device)

    def generate() -> Phases:
        timer = _PhaseTimer(device)
        for phase, tokens in (("prefill", 1), ("all", workload.new_tokens + 1)):
            model.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            timer.end(phase)
        phases = timer.phases
        return {"prefill": phases["prefill"], "decode": phases["all"] - phases["prefill"]}

    return generate


class _PhaseTimer:
    """Seconds of consecutive phases, including queued GPU work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phases = device, Phases()
        self.started = time.perf_counter()

    def end(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.phases[phase] = now - self.started
        self.started = now
