"""Reading a finished run's directory: config, environment and metrics as one frozen record.

Nothing here judges a run, and nothing imports torch; `moelm.analysis.compare` does the sums.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moelm.config import RunConfig, load_config
from moelm.document_losses import DocumentLosses, load_document_losses
from moelm.errors import MoelmError

Array = npt.NDArray[np.float64]
SYNTHETIC = "synthetic-"
"""How the names of generated domains begin: far easier text than people's, and told apart from it."""
Line = dict[str, Any]

TOTALS = ("step", "tokens", "flops", "time_s")
"""What every line of metrics.jsonl counts, cumulatively."""
FINGERPRINTS = {
    "data_fingerprint": "data",
    "tokenizer_fingerprint": "tokenizer",
    "eval_fingerprint": "evaluation set",
}
"""Keys of environment.json that make two runs comparable, with their names in a sentence."""
_ENVIRONMENT = (
    *FINGERPRINTS,
    "parameters.total",
    "parameters.active",
    "flops_per_token.forward",
    "flops_per_token.backward",
)


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation over a run: one entry an evaluation, in the order of training."""

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
    """How an MoE run used its experts: S logged steps, L sparse layers, E experts."""

    steps: Array
    layers: tuple[int, ...]
    """Positions of the sparse layers in the model."""
    share: Array
    """(S, L, E): part of the tokens that went to each expert; sums to 1 over E."""
    max_over_mean: Array
    """(S, L): load of the busiest expert over the mean load; 1 is balanced."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run, as its directory tells it."""

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
    """Losses on each evaluation document, and the step at which they were taken; None where they were not kept."""
    load: Load | None
    """None for a dense run."""

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
        """Median over the training lines, for the first steps are slow."""
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
    path = _find(run)
    metrics = path / "metrics.jsonl"
    lines = _read_metrics(metrics)
    return RunRecord(
        name=path.resolve().name,
        path=path,
        config=load_config(path / "config.yaml"),
        environment=_read_environment(path / "environment.json"),
        train=tuple(line for line in lines if "train/loss" in line),
        val=_curve(lines, metrics),
        domains_at={line["step"]: _domains(line) for line in lines if line.get("val/domains")},
        documents=load_document_losses(path / "documents.npz"),
        load=_load(lines, metrics),
    )


def read_runs(runs: Sequence[str | Path]) -> tuple[RunRecord, ...]:
    """Read several runs; those that share a name are told apart by their paths.

    Raises:
        MoelmError: as `read_run`, or a run that is given twice.
    """
    records = [read_run(run) for run in runs]
    seen: set[Path] = set()
    for record in records:
        if record.path.resolve() in seen:
            raise MoelmError(f"{record.path} is given twice; a run is compared with others, not with itself.")
        seen.add(record.path.resolve())
    names = [record.name for record in records]
    return tuple(record if names.count(record.name) == 1 else replace(record, name=str(record.path)) for record in records)


def _find(run: str | Path) -> Path:
    places = [Path(run), Path("runs") / run]
    found = [place for place in places if (place / "config.yaml").is_file()]
    if found:
        return found[0]
    if places[0].is_dir():
        raise MoelmError(f"{run} is not a run: it has no config.yaml.")
    raise MoelmError(f"There is no run {run}: neither {places[0]} nor {places[1]} is a run's directory.")


def _read_text(path: Path, missing: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MoelmError(missing) from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MoelmError(f"{path} is not a text file.") from None


def _read_environment(path: Path) -> dict[str, Any]:
    text = _read_text(path, f"{path.parent} has no environment.json; it is not a run that moelm trained.")
    try:
        environment = json.loads(text)
    except json.JSONDecodeError as error:
        raise MoelmError(f"{path} is broken at line {error.lineno}: {error.msg}.") from None
    for key in _ENVIRONMENT:
        node = environment
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, int if "." in key else str):
            raise MoelmError(f"{path} has no usable {key}, which a comparison needs.")
    return dict(environment)


def _read_metrics(path: Path) -> list[Line]:
    """The lines by step; a resumed run repeats steps, and what it wrote last counts."""
    text = _read_text(path, f"{path.parent} has no metrics.jsonl; has it been trained?")
    steps: dict[int, Line] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except json.JSONDecodeError as error:
            raise MoelmError(f"{path}, line {number} is not JSON: {error.msg}.") from None
        if not isinstance(line, dict):
            raise MoelmError(f"{path}, line {number} is not a JSON object.")
        needed = (*TOTALS, "val/loss", "val/bpb") if "val/loss" in line else TOTALS
        for key in needed:
            if not _finite(line.get(key)):
                value = json.dumps(line[key]) if key in line else "missing"
                raise MoelmError(f"{path}, line {number}: {key} is {value}; a finite number is expected.")
        steps[line["step"]] = steps.get(line["step"], {}) | line
    return [steps[step] for step in sorted(steps)]


def _curve(lines: Sequence[Line], path: Path) -> Curve:
    evaluated = [line for line in lines if "val/loss" in line]
    if not evaluated:
        raise MoelmError(f"{path.parent} has no evaluation yet: no line of {path} has a val/loss.")
    keys = (*TOTALS, "val/loss", "val/bpb")
    columns = {key: np.array([line[key] for line in evaluated], dtype=np.float64) for key in keys}
    for key in TOTALS:
        back = np.flatnonzero(np.diff(columns[key]) < 0)
        if back.size:
            step = evaluated[back[0] + 1]["step"]
            raise MoelmError(f"{path}: {key} goes back at step {step}; it must only grow.")
    return Curve(*columns.values())


def _domains(line: Line) -> dict[str, dict[str, float]]:
    """A domain without tokens in the evaluation set has no finite loss, and is left out."""
    return {
        domain: {"loss": value["loss"], "bpb": value["bpb"]}
        for domain, value in line["val/domains"].items()
        if all(_finite(value.get(key)) for key in ("loss", "bpb"))
    }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
