"""The variants and runs of a sweep, computed from its file: settings, matching widths, and steps within the budget."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moelm.config import RunConfig, differing, flatten, load_config
from moelm.console import ProgressLine, log
from moelm.data.prepare import prepare
from moelm.data.shards import read_manifest
from moelm.errors import MoelmError
from moelm.model.flops import count_flops, count_parameters
from moelm.runs.directory import RunDirectory
from moelm.sweep.config import BudgetConfig, SweepConfig, variant_overrides
from moelm.sweep.match import matching_width, model_size

TIMED_ROUNDS = 5
"""Training steps that the speed of a variant is measured with."""


class SweepVariant(NamedTuple):
    """One side of the comparison, with its shape and number of steps."""

    label: str
    overrides: list[str]
    """All its settings except name and seed."""
    config: RunConfig
    """The result, with the vocabulary size."""
    base: Path
    """The config file that they override."""
    runs: dict[int, RunDirectory]
    """By seed."""
    branch_steps: tuple[int, ...] = ()
    """Steps of the shorter runs that branch off each run."""

    @property
    def flops(self) -> int:
        """Training FLOPs of each run."""
        return self.config.train.steps * self.config.train.batch_tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token."""
        return count_flops(self.config.model, self.config.data.seq_len).training

    def branch(self, seed: int, steps: int) -> RunDirectory:
        """The shorter run of this many steps."""
        run = self.runs[seed].path
        return RunDirectory(run.with_name(f"{run.name}-{steps}"))

    @property
    def all_paths(self) -> list[Path]:
        """The directories of all runs, each followed by its branches."""
        return [
            path
            for seed, run in self.runs.items()
            for path in (run.path, *(self.branch(seed, steps).path for steps in self.branch_steps))
        ]

    def train_arguments(self, seed: int, steps: int | None = None) -> list[str]:
        """The command-line arguments of `moelm` that train one run, or a branch of it."""
        run, branch = self.runs[seed].path, []
        if steps is not None:
            branch = [f"train.steps={steps}", "--branch-from", str(run)]
            run = self.branch(seed, steps).path
        return ["train", str(self.base), *self.overrides, f"seed={seed}", f"name={run.name}", *branch]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        config, parameters = self.config, count_parameters(self.config.model)
        return {
            "label": self.label,
            "overrides": self.overrides,
            "hidden_dim": config.model.ffn.hidden_dim,
            "active": parameters.active,
            "total": parameters.total,
            "flops_per_token": self.flops_per_token,
            "steps": config.train.steps,
            "tokens": config.train.steps * config.train.batch_tokens,
            "flops": self.flops,
            "runs": [run.path.name for run in self.runs.values()],
            "branches": [self.branch(seed, steps).path.name for seed in self.runs for steps in self.branch_steps],
        }


def sweep_json(sweep: SweepConfig, variants: Sequence[SweepVariant]) -> dict[str, Any]:
    """A sweep before its training, as plain values."""
    described = [variant.as_dict() for variant in variants]
    return {"schema": 2, "name": sweep.name, "match": sweep.match, "variants": described}


def plan_sweep(path: Path, sweep: SweepConfig, overrides: Sequence[str], processes: int = 1) -> list[SweepVariant]:
    """Determine all variants; their data is prepared if necessary.

    Args:
        path: the sweep file.
        overrides: `key=value` for all variants.
        processes: that train at the same time.

    Raises:
        MoelmError: invalid settings, variants that cannot be matched, or a budget below one step.
    """
    base = path.parent / sweep.config
    load_config(base, [*overrides, f"name={sweep.name}"])  # an error in the file itself is not reported for a variant
    variants = [_load_variant(base, sweep, label, own, overrides) for label, own in variant_overrides(sweep).items()]
    _check_same_data(variants)
    if sweep.match is not None:
        target = model_size(variants[0].config, sweep.match)
        for index, variant in enumerate(variants):
            width = matching_width(variant.config, target, sweep.match)
            if width != variant.config.model.ffn.hidden_dim:
                variants[index] = _add_override(variant, f"model.ffn.hidden_dim={width}")
    if sweep.budget is not None:
        if sweep.budget.seconds is not None and processes > 1:
            raise MoelmError(
                "budget.seconds is measured on one process; with --nproc or --jobs, one of tokens or flops is expected."
            )
        steps = _steps_within(sweep.budget, variants)
        variants = [_add_override(variant, f"train.steps={count}") for variant, count in zip(variants, steps, strict=True)]
    _check_distinct(variants)
    return [variant._replace(branch_steps=_branch_steps(sweep, variant)) for variant in variants]


def _load_variant(base: Path, sweep: SweepConfig, label: str, own: list[str], shared: Sequence[str]) -> SweepVariant:
    """A variant with its settings as written."""
    fixed = {"name": "which names its runs", "seed": "which has its own seeds"}
    if sweep.budget is not None:
        fixed["train.steps"] = "whose budget determines it"
    for argument in (*own, *shared):
        if (key := argument.partition("=")[0]) in fixed:
            raise MoelmError(f"{argument!r} cannot be set in the sweep {sweep.name}, {fixed[key]}.")
    if sweep.match is not None and any(argument.startswith("model.ffn.hidden_dim=") for argument in shared):
        raise MoelmError(
            f"model.ffn.hidden_dim cannot be set for all of the sweep {sweep.name}, whose match determines it."
        )
    overrides, name = [*own, *shared], f"{sweep.name}-{label}"
    try:
        config = load_config(base, [*overrides, f"name={name}"])
    except MoelmError as error:
        raise MoelmError(f"Variant {label}: {error}") from None
    runs = {seed: RunDirectory(Path("runs") / f"{name}-{seed}") for seed in sweep.seeds}
    return SweepVariant(label, overrides, _with_vocab_size(config), base, runs)


def _branch_steps(sweep: SweepConfig, variant: SweepVariant) -> tuple[int, ...]:
    config = variant.config
    if sweep.branches and config.optim.schedule == "cosine":
        raise MoelmError(
            f"The sweep {sweep.name} has branches, but the learning rate of {variant.label} decays from the start "
            "(optim.schedule: cosine); wsd or constant is expected."
        )
    steps = tuple(sorted({round(part * config.train.steps) for part in sweep.branches}))
    if steps and (steps[0] <= config.optim.warmup_steps or steps[-1] == config.train.steps):
        raise MoelmError(
            f"The sweep {sweep.name} has branches that end at the steps {', '.join(map(str, steps))}; steps after the "
            f"warmup ({config.optim.warmup_steps}) and before the end ({config.train.steps}) are expected."
        )
    return steps


def _add_override(variant: SweepVariant, override: str) -> SweepVariant:
    overrides = [*variant.overrides, override]
    config = load_config(variant.base, [*overrides, f"name={variant.config.name}"])
    return variant._replace(overrides=overrides, config=_with_vocab_size(config))


def _with_vocab_size(config: RunConfig) -> RunConfig:
    """The config with the tokenizer's vocabulary size, if the model has none."""
    if config.model.vocab_size is not None:
        return config
    manifest = read_manifest(prepare(config.data)[0])
    assert manifest is not None
    model = config.model.model_copy(update={"vocab_size": manifest["vocab_size"]})
    return config.model_copy(update={"model": model})


def _check_same_data(variants: Sequence[SweepVariant]) -> None:
    """Losses on different text or rows cannot be compared."""
    first, *others = variants
    for other in others:
        if different := differing(flatten(first.config.data), flatten(other.config.data)):
            raise MoelmError(
                f"The variants {first.label} and {other.label} differ in data.{different[0]}, "
                "so their losses cannot be compared."
            )


def _check_distinct(variants: Sequence[SweepVariant]) -> None:
    for a, b in itertools.combinations(variants, 2):
        if a.config.model_copy(update={"name": b.config.name}) == b.config:
            raise MoelmError(f"The variants {a.label} and {b.label} have the same settings; different ones are expected.")


def _steps_within(budget: BudgetConfig, variants: Sequence[SweepVariant]) -> list[int]:
    """The number of steps of each variant's runs."""
    if budget.seconds is not None:
        return _steps_within_seconds(budget.seconds, variants)
    steps = []
    for variant in variants:
        step_cost = variant.config.train.batch_tokens * (1 if budget.flops is None else variant.flops_per_token)
        steps.append(int((budget.tokens or budget.flops or 0.0) / step_cost))
        if not steps[-1]:
            raise MoelmError(f"The budget is too small for one step of {variant.config.name}, which costs {step_cost:.3g}.")
    return steps


def _steps_within_seconds(seconds: float, variants: Sequence[SweepVariant]) -> list[int]:
    """Steps from the measured speed, or those of a run that exists; variants of equal shape get equal steps."""
    existing = [next((run for run in variant.runs.values() if run.config.exists()), None) for variant in variants]
    known = [None if run is None else load_config(run.config).train.steps for run in existing]
    unknown = [variant for variant, count in zip(variants, known, strict=True) if count is None]
    speeds = _measure_speeds({_timing_key(variant): variant for variant in unknown})
    steps = []
    for variant, count in zip(variants, known, strict=True):
        if count is None:
            count = int(seconds * speeds[_timing_key(variant)] / variant.config.train.batch_tokens)
        else:
            log(f"{variant.label} has the {count:,} steps of its first run.")
        if not count:
            raise MoelmError(f"budget.seconds is {seconds}, too short for one step of {variant.config.name}.")
        steps.append(count)
    return steps


def _timing_key(variant: SweepVariant) -> str:
    """The settings that the duration of a step depends on."""
    config = variant.config
    return f"{config.model} {config.data} {config.train.batch_tokens} {config.train.precision} {config.parallel}"


def _measure_speeds(variants: Mapping[str, SweepVariant]) -> dict[str, float]:
    """Training tokens per second by timing key, measured in alternating rounds."""
    if not variants:
        return {}
    from moelm.bench import BenchVariant, run_rounds
    from moelm.bench.variants import resolve_precision
    from moelm.bench.workloads import Workload

    timed = [BenchVariant(variant.label, resolve_precision(variant.config)) for variant in variants.values()]
    with ProgressLine("Timing the variants …") as progress_line:
        timings = run_rounds(timed, Workload(), TIMED_ROUNDS, progress_line.update)
    return {key: timing.tokens_per_s for key, timing in zip(variants, timings, strict=True)}
