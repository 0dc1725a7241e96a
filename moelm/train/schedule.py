"""The learning-rate schedule, a pure function of the step."""

import math

from moelm.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of a step, counted from 0, in a run of `steps` steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.schedule:
        case "cosine":
            ratio = 0.5 * (1 + math.cos(math.pi * done))
        case "wsd":
            ratio = min(1.0, (1 - done) / config.decay_fraction)
        case "constant":
            return config.lr
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * ratio)
