"""Run directories with linear losses, for which all expected numbers can be computed by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moelm.compare.comparison import Comparison, compare
from moelm.compare.variants import group_runs
from moelm.runs.document_losses import DocumentLosses
from moelm.runs.record import read_runs

DENSE = {"kind": "dense", "hidden_dim": 64}
MOE = {"kind": "moe", "hidden_dim": 32, "num_experts": 4, "top_k": 2}


def write_run(
    path: Path,
    *,
    slope: float,
    ffn: dict[str, Any] = DENSE,
    flops: float = 1e9,
    seconds: float = 0.1,
    evaluations: int = 4,
    schedule: str = "constant",
    environment: dict[str, Any] | None = None,
    seed: int = 0,
    documents: Sequence[float] | None = None,
) -> Path:
    """Write a finished run, evaluated every 100 steps of 1000 tokens; its loss falls from 5 by `slope` each time.

    Args:
        documents: final losses of evaluation documents of 10 tokens each, which alternate between two domains.
    """
    path.mkdir(parents=True)
    steps = 100 * evaluations
    config = {
        "name": path.name,
        "seed": seed,
        "model": {"dim": 32, "num_layers": 2, "num_heads": 4, "ffn": ffn},
        "data": {"sources": [{"name": "builtin"}], "seq_len": 10},
        "train": {"steps": steps, "batch_tokens": 1000},
        "optim": {"lr": 0.001, "schedule": schedule},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    sparse = ffn["kind"] == "moe"
    recorded = {
        "moelm": "0.1.0",
        "device": "cpu",
        "data_fingerprint": "d1",
        "tokenizer_fingerprint": "t1",
        "eval_fingerprint": "e1",
        "parameters": {"total": 40_000 if sparse else 20_000, "active": 20_100 if sparse else 20_000},
        "flops_per_token": {"forward": 40_000, "backward": 80_000},
    }
    (path / "environment.json").write_text(json.dumps(recorded | (environment or {})))
    lines = [_line(step, slope, flops, seconds, sparse) for step in range(0, steps + 1, 50)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if documents is not None:
        count = len(documents)
        columns = np.arange(count), np.arange(count) % 2, np.full(count, 10), 10 * np.array(documents, dtype=np.float64)
        DocumentLosses(*columns, ("code", "synthetic-sums")).save(path / "documents.npz", steps)
    return path


def compared(paths: Sequence[Path], force: bool = False, grouped: bool = False, **options: Any) -> Comparison:
    """The result of `moelm compare`."""
    return compare(group_runs(read_runs(paths), grouped, **options), force)


def _line(step: int, slope: float, flops: float, seconds: float, sparse: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "tokens": 1000 * step, "flops": flops * step, "time_s": seconds * step}
    if step:
        line |= {"train/loss": 5 - slope * step / 100, "train/lr": 0.001, "train/grad_norm": 1.0, "perf/mfu": 0.1}
        line |= {"perf/tokens_per_s": 1000 / seconds, "perf/memory_peak_bytes": 2**30 + step}
    if step % 100 == 0:
        loss = 5 - slope * step / 100
        line |= {"val/loss": loss, "val/bpb": loss / 2}
        line["val/domains"] = {
            name: {"loss": loss + shift, "bpb": loss / 2} for name, shift in (("code", 0.5), ("synthetic-sums", -0.5))
        }
    if sparse and step:
        layers = [{"layer": layer, "load": [0.4, 0.3, 0.2, 0.1], "load_max_over_mean": 1.6 + layer} for layer in range(2)]
        line["moe/layers"] = layers
    return line
