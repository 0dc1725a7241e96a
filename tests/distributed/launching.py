"""Starting several processes in a test."""

import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

NO_NEAR_TIES = ("model.init_std=0.1", "model.qk_norm=true", "optim.lr=0.005", "train.batch_tokens=512")
"""With these settings no token of the small runs is so near to a tie of two experts that rounding decides."""


def wait_for_steps(folder: Path, steps: int, timeout_s: float = 90) -> None:
    """Wait until more than `steps` steps are logged."""
    deadline = time.monotonic() + timeout_s
    while count_steps(folder) <= steps:
        assert time.monotonic() < deadline, f"no more than {steps} steps after {timeout_s} s"
        time.sleep(0.01)


def count_steps(folder: Path) -> int:
    """Number of logged steps."""
    path = folder / "runs/tiny-moe/metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
