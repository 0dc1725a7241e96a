"""The variation of a run's loss between seeds: estimated from runs, or taken from the report of another comparison."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moelm.compare.variants import Variant
from moelm.errors import MoelmError
from moelm.runs.record import Array

MAX_SEEDS = 1000
"""More seeds than this are not proposed."""

_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5% for 1, 2, ... degrees of freedom."""


def student_t(degrees: int) -> float:
    """Student's t at 97.5%."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees


class SeedStd(NamedTuple):
    """An estimate of the standard deviation of a run's loss over seeds."""

    std: float
    """Nats per token."""
    degrees: int
    """Degrees of freedom of the estimate."""
    source: str | None = None
    """The report that it is from; None if it is from the compared runs themselves."""

    def half_width(self, runs_a: int, runs_b: int) -> float:
        """Half width of the 95% interval of the difference between means over so many runs."""
        return student_t(self.degrees) * self.std * math.sqrt(1 / runs_a + 1 / runs_b)

    def seeds_to_decide(self, gain: float, document_half_width: float) -> int | None:
        """The smallest number of seeds of each of two variants at which the interval of this gain would exclude 0.

        Args:
            document_half_width: of the interval over documents alone, which more seeds do not make narrower.

        Returns:
            None if no number up to `MAX_SEEDS` would do.
        """
        if document_half_width >= abs(gain):
            return None
        for seeds in range(2, MAX_SEEDS + 1):
            half_width = SeedStd(self.std, seeds - 1).half_width(seeds, seeds)
            if math.hypot(document_half_width, half_width) < abs(gain):
                return seeds
        return None


def pooled_seed_std(losses: Sequence[Array], seeds: Sequence[tuple[int, ...]]) -> SeedStd | None:
    """The standard deviation over seeds, pooled over variants; None if no variant has two runs.

    If all variants have the same seeds, the effect that a seed has on all of them (through the batches) is removed: the
    residual of a randomized block design, which for two variants is the paired t-test.

    Args:
        losses: final losses of each variant's runs.
        seeds: their seeds.
    """
    if len(losses) > 1 and len(seeds[0]) > 1 and len(set(seeds)) == 1:
        table_VS = np.stack(losses)
        residual_VS = table_VS - table_VS.mean(axis=0) - table_VS.mean(axis=1, keepdims=True) + table_VS.mean()
        degrees = (len(table_VS) - 1) * (table_VS.shape[1] - 1)
        return SeedStd(math.sqrt(float((residual_VS**2).sum()) / degrees), degrees)
    return pooled_std(losses)


def pooled_std(values: Sequence[Array]) -> SeedStd | None:
    """The standard deviation within groups of values; None if no group has two."""
    degrees = sum(len(each) - 1 for each in values)
    if not degrees:
        return None
    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in values)
    return SeedStd(math.sqrt(squares / degrees), degrees)


def read_seed_std(path: Path, variants: Sequence[Variant]) -> SeedStd:
    """The standard deviation that a report.json states, which must be of runs as large and as long as these.

    Raises:
        MoelmError: the file is no report over several seeds, or is of other models or lengths.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        estimate = SeedStd(float(report["seed_std"]["std"]), int(report["seed_std"]["degrees"]), str(path))
        known = [_size(each["parameters"]["total"], each["flops_per_token"], each["tokens"]) for each in report["variants"]]
    except OSError as error:
        raise MoelmError(f"--seed-std: {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise MoelmError(
            f"--seed-std: {path} is no report.json of a comparison over several seeds, with the key seed_std."
        ) from None
    for variant in variants:
        size = _size(variant.first.parameters["total"], variant.first.flops_per_token, float(variant.val.tokens[-1]))
        if size not in known:
            raise MoelmError(
                f"--seed-std: {path} has no variant with the parameters, FLOPs per token and tokens of {variant.name}; "
                "their variation between seeds may be another."
            )
    return estimate


def _size(*numbers: Any) -> tuple[int, ...]:
    return tuple(map(int, numbers))
