"""The variants and runs of a sweep, computed from its file: settings, matching widths, and steps within the budget."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelm.config import RunConfig, differing, flatten, format_override, load_config
from moelm.data.prepare import prepare
from moelm.data.shards import read_manifest
from moelm.errors import MoelmError
from moelm.formats import count_noun
from moelm.runs.directory import RunDirectory
from moelm.sweep.budget import steps_within
from moelm.sweep.config import SweepConfig, variant_overrides
from moelm.sweep.match import matching_width, model_size
from moelm.sweep.sizes import length_overrides, warn_of_repeated_data, warn_of_untransferred_changes
from moelm.sweep.variant import SweepVariant

SIZE_LABEL = r"[A-Za-z0-9][A-Za-z0-9.-]*"
"""Labels of sizes, which become parts of file names."""


def sweep_json(
    sweep: SweepConfig, variants: Sequence[SweepVariant], seconds: Sequence[float] | None = None
) -> dict[str, Any]:
    """A sweep before its training, as plain values.

    Args:
        seconds: estimated training time of each run of a variant.
    """
    described = [variant.as_dict() for variant in variants]
    if seconds is not None:
        described = [{**each, "seconds": time} for each, time in zip(described, seconds, strict=True)]
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
    # Loaded once without its variants, so that an error in the file itself is not reported for one of them.
    config = _with_vocab_size(load_config(base, [*overrides, f"name={sweep.name}"]))
    variants = [
        variant
        for size, labels in _labels_by_size(sweep).items()
        for variant in _plan_size(base, config, sweep, size, labels, overrides)
    ]
    _check_same_data(variants)
    warn_of_untransferred_changes([variant.config for variant in variants])
    if sweep.tokens_per_param is not None:
        for variant in variants:
            warn_of_repeated_data(variant.config)
    if sweep.budget is not None:
        if sweep.budget.seconds is not None and processes > 1:
            raise MoelmError(
                "budget.seconds is measured on one process; with --nproc or --jobs, one of tokens or flops is expected."
            )
        steps = steps_within(sweep.budget, variants)
        variants = [_add_overrides(variant, f"train.steps={count}") for variant, count in zip(variants, steps, strict=True)]
    _check_distinct(variants)
    return [variant._replace(branch_steps=_branch_steps(sweep, variant)) for variant in variants]


def _labels_by_size(sweep: SweepConfig) -> dict[str | None, dict[str, list[str]]]:
    """The variants of each size, with their overrides; of a sweep without sizes, those of None."""
    overrides = variant_overrides(sweep)
    for label in sweep.match_ratio:
        if label not in list(overrides)[1:]:
            expected = ", ".join(list(overrides)[1:])
            raise MoelmError(f"match_ratio names {label!r}; one of the variants after the first is expected: {expected}.")
    if not sweep.sizes:
        return {None: overrides}
    first, labels = next(iter(overrides)), dict[str | None, dict[str, list[str]]]()
    for size, settings in sweep.sizes.items():
        if not re.fullmatch(SIZE_LABEL, size):
            raise MoelmError(f"sizes has the label {size!r}; letters, digits, dots and hyphens are expected, as in w64.")
        chosen = settings.variants or list(overrides)
        if unknown := [label for label in chosen if label not in overrides]:
            raise MoelmError(f"sizes.{size}.variants names {unknown[0]!r}; some of {', '.join(overrides)} are expected.")
        if first not in chosen:
            raise MoelmError(f"sizes.{size}.variants lacks the first variant, {first}, which the others are compared with.")
        labels[size] = {label: own for label, own in overrides.items() if label in chosen}
    for label in overrides:
        if (count := sum(label in chosen for chosen in labels.values())) < 2:
            raise MoelmError(
                f"The variant {label} of the sweep {sweep.name} has {count_noun(count, 'size')}; at least two are expected."
            )
    return labels


def _plan_size(
    base: Path,
    config: RunConfig,
    sweep: SweepConfig,
    size: str | None,
    labels: Mapping[str, list[str]],
    shared: Sequence[str],
) -> list[SweepVariant]:
    """The variants in one size, the first of which determines the widths of the others and the tokens of all."""
    variants = [_load_variant(base, sweep, size, label, own, shared) for label, own in labels.items()]
    if sweep.match is not None:
        target = model_size(variants[0].config, sweep.match)
        for index, variant in enumerate(variants):
            width = matching_width(variant.config, round(target * sweep.match_ratio.get(variant.variant, 1)), sweep.match)
            if width != variant.config.model.ffn.hidden_dim:
                variants[index] = _add_overrides(variant, f"model.ffn.hidden_dim={width}")
    if sweep.tokens_per_param is not None:
        length = length_overrides(config, variants[0].config, sweep.tokens_per_param)
        variants = [_add_overrides(variant, *length) for variant in variants]
    return variants


def _load_variant(
    base: Path, sweep: SweepConfig, size: str | None, variant: str, own: list[str], shared: Sequence[str]
) -> SweepVariant:
    """A variant with its settings as written: those of its size, then its own."""
    label, seeds = variant, sweep.seeds
    if size is not None:
        label, seeds = f"{variant}-{size}", sweep.sizes[size].seeds or sweep.seeds
        own = [*(format_override(*each) for each in sweep.sizes[size].settings.items()), *own]
    if len(set(seeds)) < len(seeds):
        raise MoelmError(f"The sweep {sweep.name} has the seeds {seeds}; different ones are expected.")
    fixed = {"name": "which names its runs", "seed": "which has its own seeds"}
    if sweep.budget is not None:
        fixed["train.steps"] = "whose budget determines it"
    if sweep.tokens_per_param is not None:
        fixed["train.steps"] = "whose tokens_per_param determines it"
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
    runs = {seed: RunDirectory(Path("runs") / f"{name}-{seed}") for seed in seeds}
    return SweepVariant(label, variant, size, overrides, _with_vocab_size(config), base, runs)


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


def _add_overrides(variant: SweepVariant, *added: str) -> SweepVariant:
    overrides = [*variant.overrides, *added]
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
