"""Numbers of steps from a budget, and the time that runs will take, from the speed of a few steps."""

from collections.abc import Mapping, Sequence

from moelm.config import load_config
from moelm.console import ProgressLine, log
from moelm.errors import MoelmError
from moelm.sweep.config import BudgetConfig
from moelm.sweep.variant import SweepVariant

TIMED_ROUNDS = 5
"""Training steps that the speed of a variant is measured with."""


def steps_within(budget: BudgetConfig, variants: Sequence[SweepVariant]) -> list[int]:
    """The number of steps of each variant's runs.

    Raises:
        MoelmError: the budget is too small for one step.
    """
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


def estimate_seconds(variants: Sequence[SweepVariant]) -> list[float]:
    """The training time of a run of each variant, alone on this machine on one process."""
    speeds: dict[str, float] = {}
    for size in dict.fromkeys(variant.size for variant in variants):
        speeds |= _measure_speeds({_timing_key(variant): variant for variant in variants if variant.size == size})
    tokens = [variant.config.train.steps * variant.config.train.batch_tokens for variant in variants]
    return [count / speeds[_timing_key(variant)] for count, variant in zip(tokens, variants, strict=True)]


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
