"""Timing of variants in alternating rounds, each variant in its own process.

Alternation exposes all variants to the same changes of machine load. With separate processes, each has its own allocator
and peak memory.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

from moelm.bench.variants import BenchVariant
from moelm.bench.workloads import Phases, Workload, build_workload
from moelm.errors import MoelmError
from moelm.hardware import dtype_of, keep_memory, peak_flops, peak_memory, pick_device

WARMUP_ROUNDS = 2
"""Rounds that are not counted, in which allocators and kernels warm up."""


class Timing(NamedTuple):
    """The measurements of one variant."""

    variant: BenchVariant
    rounds: list[Phases]
    tokens: int
    """Per round; of generation, the decoded ones."""
    flops: int
    """Per round, of active parameters; 0 if not counted."""
    memory: int
    """Peak bytes of its process, or of its GPU."""
    peak_flops: float
    load: float | None = None
    """`load_max_over_mean` after the rounds."""

    @property
    def seconds(self) -> list[float]:
        """Duration of each round."""
        return [sum(phases.values()) for phases in self.rounds]

    @property
    def phases(self) -> Phases:
        """Median duration of each phase."""
        return {name: median(phases[name] for phases in self.rounds) for name in self.rounds[0]}

    @property
    def tokens_per_s(self) -> float:
        """At the median duration of a round, or of its decoding."""
        return self.tokens / self.phases.get("decode", median(self.seconds))

    def ratio_to(self, other: "Timing") -> float:
        """Median over rounds of the ratio of this variant's duration to the other's."""
        return median(own / others for own, others in zip(self.seconds, other.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        step_s = median(self.seconds)
        return {
            "name": self.variant.name,
            "peer": self.variant.peer,
            "precision": self.variant.config.train.precision,
            "keeps_memory": self.variant.keeps_memory,
            "balanced": self.variant.balanced,
            "load_max_over_mean": self.load,
            "step_s": step_s,
            "phases_s": self.phases,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.flops / step_s / self.peak_flops,
            "memory_peak_bytes": self.memory,
            "steps_s": self.seconds,
        }


def run_rounds(
    variants: Sequence[BenchVariant], workload: Workload, rounds: int, report: Callable[[str], None]
) -> list[Timing]:
    """Time `rounds` rounds of each variant, after a warmup.

    Args:
        report: called with a progress message before each round.

    Raises:
        MoelmError: the process of a variant failed.
    """
    # Before the processes start, because their load would lower the measured peak.
    device = pick_device()
    peaks = [peak_flops(device, dtype_of(variant.config.train.precision, device)) for variant in variants]
    with _start_workers(variants, workload) as pipes:
        counts = [_receive(pipe) for pipe in pipes]
        measured: list[list[Phases]] = [[] for _ in pipes]
        for number in range(WARMUP_ROUNDS + rounds):
            report(f"Round {number + 1} of {WARMUP_ROUNDS + rounds} …")
            for pipe, phases in zip(pipes, measured, strict=True):
                pipe.send(True)
                phases.append(_receive(pipe))
        for pipe in pipes:
            pipe.send(False)
        last = [_receive(pipe) for pipe in pipes]
    return [
        Timing(variant, phases[WARMUP_ROUNDS:], tokens, flops, memory, peak, load)
        for variant, phases, (tokens, flops), (memory, load), peak in zip(
            variants, measured, counts, last, peaks, strict=True
        )
    ]


@contextmanager
def _start_workers(variants: Sequence[BenchVariant], workload: Workload) -> Iterator[list["Connection[Any, Any]"]]:
    """Start one process per variant, and terminate all of them at the end of the block."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for variant in variants:
        own_end, worker_end = context.Pipe()
        process = context.Process(target=_work, args=(variant, workload, worker_end), daemon=True)
        process.start()
        worker_end.close()
        pipes.append(own_end)
        processes.append(process)
    try:
        yield pipes
    except (EOFError, ConnectionError):
        raise MoelmError("The process of a variant was killed; the memory may not suffice for all of them.") from None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _receive(pipe: "Connection[Any, Any]") -> Any:
    """What a worker has sent; its error is raised here."""
    if isinstance(sent := pipe.recv(), Exception):
        raise sent
    return sent


def _work(variant: BenchVariant, workload: Workload, pipe: "Connection[Any, Any]") -> None:
    """A worker: send tokens and FLOPs, then the phases of one round for each True received, then peak memory and load.

    An error is sent instead, and is the last.
    """
    try:
        if variant.keeps_memory:
            keep_memory()
        timed = build_workload(variant, workload)
        pipe.send((timed.tokens, timed.flops))
        while pipe.recv():
            pipe.send(timed.run())
        memory = peak_memory(pick_device())
        pipe.send((memory, timed.load() if timed.load else None))
    except MoelmError as error:
        pipe.send(error)
    except Exception as error:
        pipe.send(RuntimeError(f"{variant.name}: {type(error).__name__}: {error}"))
