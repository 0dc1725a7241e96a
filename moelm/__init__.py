"""moelm: train mixture-of-experts language models beside dense baselines, and see what sparsity bought."""

__version__ = "0.1.0"
