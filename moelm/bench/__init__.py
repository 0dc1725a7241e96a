"""Training steps and generation timed against each other and against the same shapes in Hugging Face's library."""

from moelm.bench.contest import Timing, run_contest
from moelm.bench.contestants import Contestant, enter

__all__ = ["Contestant", "Timing", "enter", "run_contest"]
