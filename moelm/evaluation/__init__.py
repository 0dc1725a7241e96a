"""Evaluation: losses over a split, and the lm-evaluation-harness."""
