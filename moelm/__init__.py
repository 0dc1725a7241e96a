"""moelm: train mixture-of-experts language models beside dense baselines, and measure what sparsity buys.

`moelm.load(run)` loads a trained model, its tokenizer and its config. torch is imported only then.
"""

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moelm.config import RunConfig
    from moelm.data.tokenizer import Tokenizer
    from moelm.model import Transformer


def load(run: str | Path, checkpoint: str = "last") -> "tuple[Transformer, Tokenizer, RunConfig]":
    """Load a trained run: `model, tokenizer, config = moelm.load("runs/demo-moe")`.

    Args:
        run: a run's directory, or its name under `runs/`.
        checkpoint: `last`, `best` or a step number.

    Raises:
        MoelmError: no such run or checkpoint, or a damaged one.
    """
    from moelm.runs.load import load_run

    return load_run(run, checkpoint)
