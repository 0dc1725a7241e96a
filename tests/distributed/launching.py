"""Starting several processes for a test, as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

STEADY = ("model.init_std=0.1", "model.qk_norm=true", "optim.lr=0.005", "train.batch_tokens=512")
"""With these no token of the small runs stands so near between two experts that rounding would decide."""


def torchrun(folder: Path, processes: int, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`torchrun -m WORDS` in a folder."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launch, *words], cwd=folder, capture_output=True, text=True, timeout=500, env=environment, **options
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's lines."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
