"""From a sweep's file to its runs: each one's settings, widths that match, steps that spend the budget. Trains nothing."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moelm.config import RunConfig, load_config
from moelm.data.prepare import prepare
from moelm.data.store import read_manifest
from moelm.errors import MoelmError
from moelm.model.counting import count_flops
from moelm.rundir import RunDirectory
from moelm.sweep.match import matched_width, measure
from moelm.sweep.schema import BudgetConfig, Contestant, SweepConfig, contestants_of


class Entry(NamedTuple):
    """A contestant whose shape and length are settled."""

    label: str
    words: list[str]
    """All its settings but name and seed."""
    config: RunConfig
    """What they make, with the vocabulary known."""
    base: Path
    """The file that they are laid over."""
    runs: dict[int, RunDirectory]
    """By seed."""

    @property
    def flops(self) -> int:
        """Training FLOPs of each of its runs."""
        return self.config.train.steps * self.config.train.batch_tokens * flops_per_token(self.config)

    def command(self, seed: int) -> list[str]:
        """The words after `moelm` that train one of its runs."""
        return ["train", str(self.base), *self.words, f"seed={seed}", f"name={self.runs[seed].path.name}"]


def flops_per_token(config: RunConfig) -> int:
    """Forward and backward."""
    return count_flops(config.model, config.data.seq_len).training


def plan_sweep(path: Path, sweep: SweepConfig, overrides: Sequence[str]) -> list[Entry]:
    """Settle all contestants; their data is prepared if it was not.

    Args:
        path: the sweep's file.
        overrides: `key=value` words that win over each contestant's own.

    Raises:
        MoelmError: settings that do not fit, contestants that cannot be matched, or a budget below one step.
    """
    base = path.parent / sweep.config
    entries = [_shaped(base, sweep, contestant, overrides) for contestant in contestants_of(sweep)]
    if sweep.match is not None:
        target = measure(entries[0].config, sweep.match)
        entries = [_add(entry, _widened(entry, matched_width(entry.config, target, sweep.match))) for entry in entries]
    if sweep.budget is not None:
        steps = _steps(entries, sweep.budget)
        entries = [_add(entry, [f"train.steps={count}"]) for entry, count in zip(entries, steps, strict=True)]
    _check_different(entries)
    return entries


def _shaped(base: Path, sweep: SweepConfig, contestant: Contestant, overrides: Sequence[str]) -> Entry:
    words = [*contestant.words, *overrides]
    name = f"{sweep.name}-{contestant.label}"
    fixed = [word for word in words if word.partition("=")[0] in ("name", "seed")]
    if fixed:
        raise MoelmError(f"{fixed[0]!r} cannot be set in a sweep, which names its runs and seeds itself.")
    runs = {seed: RunDirectory(Path("runs") / f"{name}-{seed}") for seed in sweep.seeds}
    return _add(Entry(contestant.label, words, load_config(base, [*words, f"name={name}"]), base, runs), [])


def _add(entry: Entry, words: list[str]) -> Entry:
    """The entry with further settings."""
    words = [*entry.words, *words]
    config = load_config(entry.base, [*words, f"name={entry.config.name}"])
    if config.model.vocab_size is None:
        manifest = read_manifest(prepare(config.data)[0])
        assert manifest is not None
        known = config.model.model_copy(update={"vocab_size": manifest["vocab_size"]})
        config = config.model_copy(update={"model": known})
    return entry._replace(words=words, config=config)


def _check_different(entries: Sequence[Entry]) -> None:
    for a, b in itertools.combinations(entries, 2):
        if a.config.model_copy(update={"name": b.config.name}) == b.config:
            raise MoelmError(
                f"The contestants {a.label} and {b.label} have the same settings; there is nothing to compare."
            )


def _widened(entry: Entry, width: int) -> list[str]:
    return [] if width == entry.config.model.ffn.hidden_dim else [f"model.ffn.hidden_dim={width}"]


def _steps(entries: Sequence[Entry], budget: BudgetConfig) -> list[int]:
    """How many steps each contestant's runs can pay for."""
    if budget.seconds is not None:
        return _steps_in(budget.seconds, entries)
    found = []
    for entry in entries:
        price = entry.config.train.batch_tokens * (1 if budget.flops is None else flops_per_token(entry.config))
        found.append(int((budget.tokens or budget.flops or 0.0) / price))
        if not found[-1]:
            raise MoelmError(f"The budget does not pay for one step of {entry.config.name}, which costs {price:.3g}.")
    return found


def _steps_in(seconds: float, entries: Sequence[Entry]) -> list[int]:
    """By the clock: what a contestant's begun runs have, or else what turns taken now promise."""
    from moelm import bench
    from moelm.bench.contestants import settle
    from moelm.bench.jobs import Work
    from moelm.console import Ticker

    begun = [next((run for run in entry.runs.values() if run.config.exists()), None) for entry in entries]
    known = [None if run is None else load_config(run.config).train.steps for run in begun]
    fresh = [
        bench.Contestant(entry.label, settle(entry.config))
        for entry, steps in zip(entries, known, strict=True)
        if steps is None
    ]
    with Ticker("Timing the contestants …") as ticker:
        timings = iter(bench.run_contest(fresh, Work(0), TURNS, ticker.update) if fresh else [])
    found = []
    for entry, steps in zip(entries, known, strict=True):
        if steps is None:
            rate = next(timings).as_dict()["tokens_per_s"]
            steps = int(seconds * rate / entry.config.train.batch_tokens)
        if not steps:
            raise MoelmError(f"budget.seconds is {seconds}, too short for one step of {entry.config.name}.")
        found.append(steps)
    return found


TURNS = 5
"""Turns that a contestant is timed for."""
