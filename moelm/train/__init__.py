"""Training: setup, loop, objective, optimizer, metrics and checkpoint saving."""
