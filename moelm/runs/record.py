"""A trained run as one immutable record: config, environment, metrics and document losses. Nothing here imports torch."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moelm.config import RunConfig, load_config
from moelm.errors import MoelmError
from moelm.runs.cpu_load import CpuUse, mean_use
from moelm.runs.directory import RunDirectory
from moelm.runs.document_losses import DocumentLosses, load_document_losses
from moelm.runs.metrics import TOTALS, Line, is_finite, read_metrics

Array = npt.NDArray[np.float64]
SYNTHETIC = "synthetic-"
"""Prefix of generated domains, which are much easier to predict than real text and are reported separately."""

LOSSY_NOTE = "loses a part of the text: bits per byte are those of the rest, and not comparable with other tokenizers."
"""What is said of a tokenizer if `lossy` is true in environment.json."""

FINGERPRINTS = {
    "data_fingerprint": "data",
    "tokenizer_fingerprint": "tokenizer",
    "eval_fingerprint": "evaluation set",
}
"""Keys of environment.json that comparable runs share, and their names in messages."""
_REQUIRED = (
    *FINGERPRINTS,
    "parameters.total",
    "parameters.active",
    "flops_per_token.forward",
    "flops_per_token.backward",
)


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation losses of a run: one entry per evaluation, in step order."""

    steps: Array
    tokens: Array
    flops: Array
    seconds: Array
    """Training time, without evaluation and saving."""
    loss: Array
    """Nats per token."""
    bpb: Array
    """Bits per byte."""


@dataclass(frozen=True, eq=False)
class Load:
    """The expert load of an MoE run: S logged steps, L sparse layers, E experts."""

    steps: Array
    layers: tuple[int, ...]
    """Indices of the sparse layers."""
    share: Array
    """`(S, L, E)`: each expert's share of the assignments; sums to 1 over E."""
    max_over_mean: Array
    """`(S, L)`: maximum load over mean load; 1 is balanced."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run, as read from its directory."""

    name: str
    path: Path
    config: RunConfig
    environment: dict[str, Any]
    train: tuple[Line, ...]
    """The lines with a training loss."""
    val: Curve
    domains_at: dict[int, dict[str, dict[str, float]]]
    """`loss` and `bpb` of each domain, by the step of the evaluation."""
    documents: tuple[DocumentLosses, int] | None
    """Losses of the validation documents, and the step of that evaluation; None if they were not saved."""
    load: Load | None
    """None for a dense run."""
    cpu_use: CpuUse | None
    """Use of the machine by other processes; None if it was not recorded."""

    @property
    def parameters(self) -> dict[str, int]:
        """`total`, `active` and perhaps `embedding` parameters."""
        return dict(self.environment["parameters"])

    @property
    def flops_per_token(self) -> int:
        """Forward and backward together."""
        flops = self.environment["flops_per_token"]
        return int(flops["forward"] + flops["backward"])

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the training lines, because the first steps are slow."""
        rates = [line["perf/tokens_per_s"] for line in self.train if line.get("perf/tokens_per_s")]
        return float(statistics.median(rates)) if rates else None

    @property
    def memory_peak(self) -> int | None:
        """Bytes."""
        peaks = [line["perf/memory_peak_bytes"] for line in self.train if line.get("perf/memory_peak_bytes")]
        return int(max(peaks)) if peaks else None


def read_run(run: str | Path) -> RunRecord:
    """Read one run.

    Args:
        run: a run's directory, or its name under `runs/`.
    Raises:
        MoelmError: no such run, a missing or broken file, or a run without any evaluation.
    """
    directory = RunDirectory.find(run)
    path = directory.path
    lines = read_metrics(directory.metrics)
    return RunRecord(
        name=path.resolve().name,
        path=path,
        config=load_config(directory.config),
        train=tuple(line for line in lines if "train/loss" in line),
        val=_curve(lines, directory.metrics),
        environment=_comparable_environment(directory),
        domains_at={line["step"]: _domains(line) for line in lines if line.get("val/domains")},
        documents=load_document_losses(directory.documents),
        load=_load(lines, directory.metrics),
        cpu_use=mean_use(lines),
    )


def read_runs(runs: Sequence[str | Path]) -> tuple[RunRecord, ...]:
    """Read several runs; runs with the same name are named by their paths.

    Raises:
        MoelmError: as `read_run`, or a run given twice.
    """
    records = [read_run(run) for run in runs]
    seen: set[Path] = set()
    for record in records:
        if record.path.resolve() in seen:
            raise MoelmError(f"{record.path} is given twice; different runs are expected.")
        seen.add(record.path.resolve())
    names = [record.name for record in records]
    return tuple(record if names.count(record.name) == 1 else replace(record, name=str(record.path)) for record in records)


def read_environment(run: RunDirectory) -> dict[str, Any]:
    """The content of environment.json.

    Raises:
        MoelmError: it is missing or broken.
    """
    path = run.environment
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoelmError(f"{run.path} has no environment.json; it is not a run that moelm trained.") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MoelmError(f"{path} is not a text file.") from None
    except json.JSONDecodeError as error:
        raise MoelmError(f"{path} is broken at line {error.lineno}: {error.msg}.") from None
    if not isinstance(environment, dict):
        raise MoelmError(f"{path} is not a JSON object.")
    return environment


def _comparable_environment(run: RunDirectory) -> dict[str, Any]:
    environment, path = read_environment(run), run.environment
    for key in _REQUIRED:
        node: Any = environment
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, int if "." in key else str):
            raise MoelmError(f"{path} has no usable {key}, which a comparison needs.")
    return environment


def _curve(lines: Sequence[Line], path: Path) -> Curve:
    evaluated = [line for line in lines if "val/loss" in line]
    if not evaluated:
        raise MoelmError(f"{path.parent} has no evaluation yet: no line of {path} has a val/loss.")
    keys = (*TOTALS, "val/loss", "val/bpb")
    columns = {key: np.array([line[key] for line in evaluated], dtype=np.float64) for key in keys}
    for key in TOTALS:
        decreases = np.flatnonzero(np.diff(columns[key]) < 0)
        if decreases.size:
            step = evaluated[decreases[0] + 1]["step"]
            raise MoelmError(f"{path}: {key} goes back at step {step}; it must only grow.")
    return Curve(*columns.values())


def _domains(line: Line) -> dict[str, dict[str, float]]:
    """Losses by domain; a domain without tokens in the validation set has no finite loss and is left out."""
    return {
        domain: {"loss": value["loss"], "bpb": value["bpb"]}
        for domain, value in line["val/domains"].items()
        if all(is_finite(value.get(key)) for key in ("loss", "bpb"))
    }


def _load(lines: Sequence[Line], path: Path) -> Load | None:
    sparse = [line for line in lines if line.get("moe/layers")]
    if not sparse:
        return None
    try:
        layers = tuple(int(layer["layer"]) for layer in sparse[0]["moe/layers"])
        shares = [[layer["load"] for layer in line["moe/layers"]] for line in sparse]
        share = np.array(shares, dtype=np.float64)
        peak = [[layer["load_max_over_mean"] for layer in line["moe/layers"]] for line in sparse]
        max_over_mean = np.array(peak, dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        share = np.empty(0)
    if share.ndim != 3:
        raise MoelmError(
            f"{path}: moe/layers must hold the same layers and experts in every line, "
            "each with layer, load and load_max_over_mean."
        )
    return Load(np.array([line["step"] for line in sparse], dtype=np.float64), layers, share, max_over_mean)
