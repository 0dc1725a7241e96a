"""The demo script on the first documents of the builtin corpus, with a few steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelm.config import load_config
from moelm.model import count_flops, count_parameters

ROOT = Path(__file__).parent.parent
OVERRIDES = (
    "data.sources.0.max_documents=400",
    "train.steps=20",
    "train.checkpoint_every=5",
    "optim.warmup_steps=2",
)


@pytest.mark.slow(seconds=40)
def test_the_demo_writes_a_report(tmp_path: Path) -> None:
    for folder in ("configs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    # With its own number of threads.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["bash", "scripts/demo.sh", *OVERRIDES],
        cwd=tmp_path,
        env={**environment, "BIN": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "reports/demo/report.json").read_text())
    assert report["schema"] == 3
    assert [length["steps"] for length in report["variants"][1]["lengths"]] == [12, 20]
    for name in ("report.html", "report.md", "comparison.png", "load.png"):
        assert (tmp_path / "reports/demo" / name).stat().st_size > 1000
    dense, moe = (json.loads((tmp_path / f"runs/demo-{kind}/environment.json").read_text()) for kind in ("dense", "moe"))
    assert dense["eval_fingerprint"] == moe["eval_fingerprint"]
    assert "The demo took" in done.stdout


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_recorded_variation_between_seeds_is_of_the_demos_models(kind: str) -> None:
    """The demo reads it at its end, and would refuse that of other models."""
    config = load_config(ROOT / f"configs/demo-{kind}.yaml")
    model = config.model.model_copy(update={"vocab_size": config.data.tokenizer.vocab_size})
    report = json.loads((ROOT / "docs/studies/demo.json").read_text())
    recorded = [(each["parameters"]["total"], each["flops_per_token"], each["tokens"]) for each in report["variants"]]
    tokens = config.train.steps * config.train.batch_tokens
    flops = count_flops(model, config.data.seq_len).training
    assert (count_parameters(model).total, flops, tokens) in recorded
