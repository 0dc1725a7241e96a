"""How fast Muon orthogonalizes the matrices of a config, relative to products of the model's shapes and to a loop.

    python scripts/bench_optimizer.py configs/demo-moe.yaml

Prints one line for each shape: the rate of the batched orthogonalization, the rate of a product of a batch's tokens with a
matrix of this shape, their ratio, and the time of one matrix after another relative to the batch. Durations are medians
over alternating rounds, in the precision that `train.precision` resolves to.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from moelm.bench.models import resolve_model
from moelm.bench.variants import resolve_precision
from moelm.config import load_config
from moelm.hardware import dtype_of, keep_memory, pick_device
from moelm.plan.update import block_shape, muon_weights
from moelm.train.polar import orthogonalize

ROUNDS = 9


def main() -> None:
    """Time every shape of the config, which is the first argument; the others are overrides."""
    keep_memory()
    config = resolve_precision(load_config(sys.argv[1], [*sys.argv[2:], "optim.kind=muon"]))
    config = config.model_copy(update={"model": resolve_model(config)})
    device, steps = pick_device(), config.optim.newton_schulz_steps
    dtype = dtype_of(config.train.precision, device)
    matrices: Counter[tuple[int, int]] = Counter()
    for weight, number in muon_weights(config).items():
        shape = block_shape(config, weight)
        matrices[shape] += number * weight.size // (shape[0] * shape[1])
    for (rows, columns), count in matrices.items():
        short, long = sorted((rows, columns))
        batch = torch.randn(count, rows, columns, device=device).to(dtype)
        tokens = torch.randn(config.train.batch_tokens, columns, device=device).to(dtype)
        batched_s, loop_s, product_s = time_alternating(
            partial(orthogonalize, batch, steps),
            partial(orthogonalize_each, batch, steps),
            partial(torch.mm, tokens, batch[0].mT),
        )
        rate = count * steps * (4 * short**2 * long + 2 * short**3) / batched_s
        product = 2 * len(tokens) * rows * columns / product_s
        print(
            f"{count} of {rows}x{columns}: {rate / 1e9:,.0f} GFLOP/s, products {product / 1e9:,.0f} "
            f"({rate / product:.0%}); one after another {loop_s / batched_s:.1f}x"
        )


def orthogonalize_each(batch: Tensor, steps: int) -> None:
    """Orthogonalize one matrix after another."""
    for matrix in batch:
        orthogonalize(matrix[None], steps)


def time_alternating(*functions: Callable[[], object]) -> list[float]:
    """The median seconds of each function, after two rounds of warmup."""
    durations: list[list[float]] = [[] for _ in functions]
    for _ in range(2 + ROUNDS):
        for function, seconds in zip(functions, durations, strict=True):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return [median(seconds[2:]) for seconds in durations]


if __name__ == "__main__":
    main()
