"""Timing of training steps and generation: several configs, and Hugging Face's models of the same shapes."""

from moelm.bench.timing import Timing, run_rounds
from moelm.bench.variants import BenchVariant, list_variants

__all__ = ["BenchVariant", "Timing", "list_variants", "run_rounds"]
