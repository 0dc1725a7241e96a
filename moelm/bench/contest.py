"""Contestants timed in turns, each in a process of its own: what the machine does in the meantime hits all of them alike,
and each one's allocator and peak memory are its own.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

from moelm.bench.contestants import Contestant
from moelm.bench.jobs import Phases, Work, build_job
from moelm.errors import MoelmError
from moelm.hardware import dtype_of, keep_memory, peak_flops, peak_memory, pick_device

WARMUP = 2
"""Rounds that are not counted: allocators and kernels settle."""


class Timing(NamedTuple):
    """What a contestant's turns took."""

    entry: Contestant
    turns: list[Phases]
    tokens: int
    """Of one turn; of generation, those decoded."""
    flops: int
    """Of one turn, active experts only; 0 where they say nothing."""
    memory: int
    """Peak bytes of its process, or of its GPU."""
    peak_flops: float

    @property
    def seconds(self) -> list[float]:
        """Each turn's whole."""
        return [sum(phases.values()) for phases in self.turns]

    @property
    def phases(self) -> Phases:
        """The middle turn of each phase."""
        return {name: median(turn[name] for turn in self.turns) for name in self.turns[0]}

    def times(self, other: "Timing") -> float:
        """How many times as long as another's turn: the median over rounds, where both met the same weather."""
        return median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        middle = median(self.seconds)
        spent = self.phases.get("decode", middle)
        return {
            "name": self.entry.name,
            "peer": self.entry.peer,
            "precision": self.entry.config.train.precision,
            "keeps_memory": self.entry.keeps_memory,
            "step_s": middle,
            "phases_s": self.phases,
            "tokens_per_s": self.tokens / spent,
            "mfu": self.flops / middle / self.peak_flops,
            "memory_peak_bytes": self.memory,
            "steps_s": self.seconds,
        }


def run_contest(entries: Sequence[Contestant], work: Work, rounds: int, show: Callable[[str], None]) -> list[Timing]:
    """Time `rounds` turns of each contestant.

    Args:
        show: told how far the work has come.
    """
    # Before the contestants start: a peak measured beside them would be too low.
    device = pick_device()
    peaks = [peak_flops(device, dtype_of(entry.config.train.precision, device)) for entry in entries]
    with _workers(entries, work) as pipes:
        about = [pipe.recv() for pipe in pipes]
        turns: list[list[Phases]] = [[] for _ in pipes]
        for number in range(WARMUP + rounds):
            show(f"Round {number + 1} of {WARMUP + rounds} …")
            for pipe, taken in zip(pipes, turns, strict=True):
                pipe.send(True)
                taken.append(pipe.recv())
        for pipe in pipes:
            pipe.send(False)
        memory = [pipe.recv() for pipe in pipes]
    return [
        Timing(entry, taken[WARMUP:], tokens, flops, used, peak)
        for entry, taken, (tokens, flops), used, peak in zip(entries, turns, about, memory, peaks, strict=True)
    ]


@contextmanager
def _workers(entries: Sequence[Contestant], work: Work) -> Iterator[list["Connection[Any, Any]"]]:
    """Start one process for each contestant; they end with the block, however it ends."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for entry in entries:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(entry, work, there), daemon=True)
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


def _work(entry: Contestant, work: Work, pipe: "Connection[Any, Any]") -> None:
    """A contestant's process: build, tell the facts, then a turn for every word, and at the end the peak memory."""
    if entry.keeps_memory:
        keep_memory()
    job, tokens, flops = build_job(entry, work)
    pipe.send((tokens, flops))
    while pipe.recv():
        pipe.send(job())
    pipe.send(peak_memory(pick_device()))
