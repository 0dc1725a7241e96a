"""From a sweep's file to its runs: each one's settings, widths that match, steps that spend the budget. Trains nothing."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moelm.config import RunConfig, differing, flatten, load_config
from moelm.console import Ticker, console
from moelm.data.prepare import prepare
from moelm.data.store import read_manifest
from moelm.errors import MoelmError
from moelm.model.counting import count_flops
from moelm.rundir import RunDirectory
from moelm.sweep.match import matched_width, size_on
from moelm.sweep.schema import BudgetConfig, Entrant, SweepConfig, entrants_of

TURNS = 5
"""Turns that a contestant is timed for."""


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


def plan_sweep(path: Path, sweep: SweepConfig, overrides: Sequence[str], processes: int = 1) -> list[Entry]:
    """Settle all contestants; their data is prepared if it was not.

    Args:
        path: the sweep's file.
        overrides: `key=value` words that win over each contestant's own.
        processes: for each run.

    Raises:
        MoelmError: settings that do not fit, contestants that cannot be matched, or a budget below one step.
    """
    base = path.parent / sweep.config
    load_config(base, [*overrides, f"name={sweep.name}"])  # what is wrong with the file itself is no contestant's fault
    entries = [_shaped(base, sweep, entrant, overrides) for entrant in entrants_of(sweep)]
    _check_data(entries)
    if sweep.match is not None:
        target = size_on(entries[0].config, sweep.match)
        entries = [_add(entry, _widened(entry, matched_width(entry.config, target, sweep.match))) for entry in entries]
    if sweep.budget is not None:
        if sweep.budget.seconds is not None and processes > 1:
            raise MoelmError("budget.seconds is timed on one process; with --nproc give a budget of tokens or flops.")
        steps = _steps(entries, sweep.budget)
        entries = [_add(entry, [f"train.steps={count}"]) for entry, count in zip(entries, steps, strict=True)]
    _check_different(entries)
    return entries


def _shaped(base: Path, sweep: SweepConfig, entrant: Entrant, overrides: Sequence[str]) -> Entry:
    taken = {"name": "which names its runs itself", "seed": "which has seeds of its own"}
    taken |= {"train.steps": "whose budget decides it"} if sweep.budget is not None else {}
    for word in (*entrant.words, *overrides):
        if (key := word.partition("=")[0]) in taken:
            raise MoelmError(f"{word!r} cannot be set in the sweep {sweep.name}, {taken[key]}.")
    if sweep.match is not None and any(word.startswith("model.ffn.hidden_dim=") for word in overrides):
        raise MoelmError(f"model.ffn.hidden_dim cannot be set for all of the sweep {sweep.name}, whose match decides it.")
    words, name = [*entrant.words, *overrides], f"{sweep.name}-{entrant.label}"
    runs = {seed: RunDirectory(Path("runs") / f"{name}-{seed}") for seed in sweep.seeds}
    try:
        config = load_config(base, [*words, f"name={name}"])
    except MoelmError as error:
        raise MoelmError(f"Contestant {entrant.label}: {error}") from None
    return _add(Entry(entrant.label, words, config, base, runs), [])


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


def _check_data(entries: Sequence[Entry]) -> None:
    """Losses on other text or other rows do not compare."""
    first, *others = (flatten(entry.config.data) for entry in entries)
    for entry, data in zip(entries[1:], others, strict=True):
        if different := differing(first, data):
            raise MoelmError(
                f"The contestants {entries[0].label} and {entry.label} differ in data.{different[0]}, "
                "so their losses would not compare."
            )


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
    """By the clock: what a contestant's begun runs have, or else what turns taken now promise; equal shapes get equal
    steps."""
    begun = [next((run for run in entry.runs.values() if run.config.exists()), None) for entry in entries]
    known = [None if run is None else load_config(run.config).train.steps for run in begun]
    fresh = {_shape(entry): entry for entry, steps in zip(entries, known, strict=True) if steps is None}
    rates = _rates(fresh)
    found = []
    for entry, steps in zip(entries, known, strict=True):
        if steps is None:
            steps = int(seconds * rates[_shape(entry)] / entry.config.train.batch_tokens)
        else:
            console.print(f"{entry.label} keeps the {steps:,} steps of its first run.", soft_wrap=True, markup=False)
        if not steps:
            raise MoelmError(f"budget.seconds is {seconds}, too short for one step of {entry.config.name}.")
        found.append(steps)
    return found


def _shape(entry: Entry) -> str:
    """What the time of a step depends on."""
    config = entry.config
    return f"{config.model} {config.data} {config.train.batch_tokens} {config.train.precision} {config.parallel}"


def _rates(entries: Mapping[str, Entry]) -> dict[str, float]:
    """Tokens a second of training steps, timed in turns."""
    if not entries:
        return {}
    from moelm import bench
    from moelm.bench.contestants import settle
    from moelm.bench.jobs import Work

    timed = [bench.Contestant(entry.label, settle(entry.config)) for entry in entries.values()]
    with Ticker("Timing the contestants …") as ticker:
        timings = bench.run_contest(timed, Work(0), TURNS, ticker.update)
    return {shape: timing.as_dict()["tokens_per_s"] for shape, timing in zip(entries, timings, strict=True)}
