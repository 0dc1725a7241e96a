"""Speed on one GPU in one table: a dense model, and 8 and 64 experts with equal active parameters; Hugging Face's models of
the same shapes; and the expert kernels relative to dense matrix products with the same FLOPs.

    python scripts/bench_gpu.py            # on a GPU
    python scripts/bench_gpu.py configs/bench-dense.yaml configs/bench-moe.yaml    # other shapes, any machine

The first config is the reference for relative speed: each other variant, peers too, is timed in alternation with it alone,
so that no more than two models are in memory. The reference's own row is of the first of these pairs.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch import Tensor

from moelm.bench import BenchVariant, list_variants, run_rounds
from moelm.bench.workloads import Workload
from moelm.cli.options import PIPE_WIDTH, plain_table
from moelm.config import MoEFFNConfig
from moelm.console import ProgressLine
from moelm.hardware import dtype_of, pick_device
from moelm.model.swiglu import grouped_swiglu

CONFIGS = [f"configs/gpu-{name}.yaml" for name in ("dense", "moe8", "moe64")]


def median_seconds(function: Callable[[], Tensor], inputs: list[Tensor], device: torch.device, repeats: int = 20) -> float:
    """Median duration of a forward and backward pass, after three that are not counted."""
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        y = function()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[3:])


def relative_kernel_speed(variant: BenchVariant) -> float:
    """Speed of one layer's experts under even load, relative to dense matrix products with the same FLOPs."""
    device = pick_device()
    dtype = dtype_of(variant.config.train.precision, device)
    model, ffn, tokens = variant.config.model, variant.config.model.ffn, variant.config.train.batch_tokens
    assert isinstance(ffn, MoEFFNConfig)
    dim, hidden, experts, top_k = model.dim, ffn.hidden_dim, ffn.num_experts, ffn.top_k

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(0.02).requires_grad_()

    rows = tokens * top_k
    x, gates = random(rows, dim), torch.ones(rows, device=device)
    weights = (random(experts, hidden, dim), random(experts, dim, hidden), random(experts, hidden, dim))
    ends = torch.arange(1, experts + 1, device=device) * (rows // experts)
    swiglu = torch.compile(grouped_swiglu) if device.type == "cuda" else grouped_swiglu
    sparse_s = median_seconds(lambda: swiglu(x, ends, weights, model.activation, gates), [x, *weights], device)
    x_dense, up, down = random(tokens, dim), random(2 * top_k * hidden, dim), random(dim, top_k * hidden)
    activations = random(tokens, top_k * hidden)
    dense_s = median_seconds(lambda: x_dense @ up.t(), [x_dense, up], device)
    dense_s += median_seconds(lambda: activations @ down.t(), [activations, down], device)
    return dense_s / sparse_s


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    variants = list_variants([Path(config) for config in options.configs], [], None, peers=not options.no_peers)
    reference, *others = variants
    with ProgressLine("Building the models …") as progress_line:
        together = [[reference, other] for other in others] or [[reference]]
        timed = [run_rounds(pair, Workload(), options.rounds, progress_line.update) for pair in together]
    rows = [(timed[0][0], 1.0)]
    rows += [(timing, 1 / timing.ratio_to(first)) for first, *second in timed for timing in second]
    table = plain_table(
        "variant", "precision", "ms/step", "tokens/s", "relative speed", "MFU", "peak MiB", "expert kernels / dense GEMM"
    )
    for timing, relative_speed in rows:
        result, variant = timing.as_dict(), timing.variant
        has_experts = not variant.peer and isinstance(variant.config.model.ffn, MoEFFNConfig)
        table.add_row(
            variant.name,
            result["precision"],
            f"{1e3 * result['step_s']:,.1f}",
            f"{result['tokens_per_s']:,.0f}",
            f"{relative_speed:.2f}",
            f"{result['mfu']:.1%}",
            f"{timing.memory / 2**20:,.0f}",
            f"{relative_kernel_speed(variant):.0%}" if has_experts else "",
        )
    Console(highlight=False, width=PIPE_WIDTH).print(table)


if __name__ == "__main__":
    main()
