"""A comparison of variants, computed from what their runs recorded; it reads and writes no files."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelm.compare.axes import AXES, Axis
from moelm.compare.bootstrap import PairedBootstrap
from moelm.compare.pairwise import PairResult, compare_pair
from moelm.compare.scaling import DoublingFit, fit_doubling
from moelm.compare.seed_std import SeedStd, pooled_seed_std
from moelm.compare.variants import Variant
from moelm.compare.verdict import Verdict, decide, reading_notes
from moelm.config import flatten
from moelm.data.effective_documents import effective_documents, few_documents_warning
from moelm.errors import MoelmError
from moelm.formats import join_names
from moelm.runs.record import FINGERPRINTS, RunRecord


@dataclass(frozen=True)
class Comparison:
    """All results that a report contains."""

    variants: tuple[Variant, ...]
    """The first is the reference."""
    pairs: tuple[PairResult, ...]
    """Every ordered pair of variants."""
    challenger: str
    """Of the other variants, the one with the lowest final loss; the verdict compares it with the reference."""
    verdict: Verdict
    scaling: DoublingFit | None
    """None unless variants differ in one setting of the experts."""
    seed_std: SeedStd | None
    """The variation of final losses between seeds; None if no variant has two runs."""
    notes: tuple[str, ...]
    """Limitations of the comparison."""
    warnings: tuple[str, ...]
    """Why these runs are not comparable, if forced, and whether the evaluation documents are few."""
    forced: bool
    """Whether the runs are not comparable."""
    config_differences: Mapping[str, Mapping[str, Any]]
    """The value of each variant, by dotted config key, for the keys in which variants differ."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The costs that are compared; dollars only if prices were given."""
        return tuple(self.pairs[0].cost_to_reach)

    def pair(self, a: str, b: str) -> PairResult:
        """The result of variant `a` against variant `b`."""
        return next(pair for pair in self.pairs if (pair.a, pair.b) == (a, b))


def compare(variants: Sequence[Variant], force: bool = False, seed_std: SeedStd | None = None) -> Comparison:
    """Compare variants with each other; the first is the reference.

    Args:
        seed_std: the variation between seeds, for variants with one run each.

    Raises:
        MoelmError: there are fewer than two, or their runs are on different data and `force` is not set.
    """
    if len(variants) < 2:
        raise MoelmError("A comparison needs at least two variants.")
    differences = tuple(mismatches([run for variant in variants for run in variant.all_runs]))
    if differences and not force:
        raise MoelmError(f"{' '.join(differences)} Use --force to compare the runs anyway.")
    reference = variants[0]
    challenger = min(variants[1:], key=lambda variant: variant.val.loss[-1])
    axes = AXES if all(variant.price is not None for variant in variants) else AXES[:-1]
    documents = PairedBootstrap(variants, seed_std)
    pairs = [
        compare_pair(a, b, axes, documents)
        for first, second in itertools.combinations(variants, 2)
        for a, b in ((first, second), (second, first))
    ]
    return Comparison(
        variants=tuple(variants),
        pairs=tuple(pairs),
        challenger=challenger.name,
        verdict=decide(challenger, reference, pairs),
        scaling=fit_doubling(variants),
        seed_std=pooled_seed_std([each.final_losses for each in variants], [each.seeds for each in variants]),
        notes=tuple(reading_notes(variants, challenger, reference, pairs)),
        warnings=(*differences, *few_documents(reference)),
        forced=bool(differences),
        config_differences=_config_differences(variants),
    )


def mismatches(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Why the losses of runs cannot be compared with those of the first, one sentence each."""
    reference = runs[0]
    for run in runs[1:]:
        differ = [name for key, name in FINGERPRINTS.items() if run.environment[key] != reference.environment[key]]
        names = f"{reference.name} and {run.name}"
        if differ == ["data"]:
            yield f"{names} were trained on different data, so their losses differ for that reason too."
        elif differ:
            lossy = reference.environment.get("lossy") or run.environment.get("lossy")
            hint = " (only bits per byte are)" if differ == ["tokenizer"] and not lossy else ""
            yield f"{names} differ in {join_names(differ)}, so their losses are not comparable{hint}."


def few_documents(reference: Variant) -> Iterator[str]:
    """A sentence if the evaluation documents are too few for an interval over them."""
    if (saved := reference.document_losses) is None:
        return
    lengths = saved[0].tokens.tolist()
    if warning := few_documents_warning(len(lengths), effective_documents(lengths)):
        yield warning[0].upper() + warning[1:]


def _config_differences(variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """By key and variant; the seeds of a group are one value, and so are its lengths."""
    settings = {variant.name: flatten(variant.first.config) for variant in variants}
    for variant in variants:
        if len(variant.runs) > 1:
            settings[variant.name]["seed"] = ", ".join(map(str, variant.seeds))
        if variant.shorter:
            steps = [length.first.config.train.steps for length in variant.lengths]
            settings[variant.name]["train.steps"] = ", ".join(map(str, steps))
    reference = settings[variants[0].name]
    keys = dict.fromkeys(key for values in settings.values() for key in values if key != "name")
    return {
        key: {name: values.get(key) for name, values in settings.items()}
        for key in keys
        if any(values.get(key) != reference.get(key) for values in settings.values())
    }
