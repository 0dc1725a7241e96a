"""Speed on one GPU: a dense model, and 8 and 64 experts with equal active parameters, at two widths.

    python scripts/bench_gpu.py --out bench-gpu                                    # on a GPU of 80 GB
    python scripts/bench_gpu.py configs/bench-dense.yaml configs/bench-moe.yaml    # other shapes, any machine

Each mixture is timed twice: with its router's choices on random tokens, and with equal loads of its experts, which
published figures often assume. Hugging Face's models of the first shape are last. A shape's first config is its reference:
every other variant is timed in alternation with it alone, so that no more than two models are in memory. The last column is
the speed of a layer's experts under equal loads, relative to dense products with the same FLOPs.

`--out` writes bench-gpu.json and bench-gpu.md after each pair. A pair that might not end within `--minutes`, taking as long
as the longest so far, is left out and listed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from study import markdown_table
from torch import Tensor

from moelm.atomic import atomic_file, require_empty_directory
from moelm.bench import BenchVariant, Timing, list_variants, run_rounds
from moelm.bench.workloads import Workload
from moelm.config import MoEFFNConfig
from moelm.console import ProgressLine, log
from moelm.errors import MoelmError
from moelm.hardware import dtype_of, pick_device
from moelm.model.swiglu import grouped_swiglu

SHAPES = [[f"configs/{shape}-{name}.yaml" for name in ("dense", "moe8", "moe64")] for shape in ("gpu", "gpu-wide")]


class Result(NamedTuple):
    """One row of the table."""

    timing: Timing
    relative_speed: float
    """To the reference of its shape."""
    kernel_speed: float | None
    """See `relative_kernel_speed`; None for dense models and peers."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.timing.as_dict(), "relative_speed": self.relative_speed, "kernel_speed": self.kernel_speed}

    def cells(self) -> list[str]:
        """The table's cells."""
        result = self.timing.as_dict()
        return [
            self.timing.variant.name,
            result["precision"],
            f"{1e3 * result['step_s']:,.1f}",
            f"{result['tokens_per_s']:,.0f}",
            f"{self.relative_speed:.2f}",
            f"{result['mfu']:.1%}",
            "" if self.timing.load is None else f"{self.timing.load:.2f}",
            f"{self.timing.memory / 2**20:,.0f}",
            "" if self.kernel_speed is None else f"{self.kernel_speed:.0%}",
        ]


HEAD = [
    "variant",
    "precision",
    "ms/step",
    "tokens/s",
    "relative speed",
    "MFU",
    "load max/mean",
    "peak MiB",
    "experts / GEMM",
]


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


def relative_kernel_speed(variant: BenchVariant) -> float | None:
    """Speed of one layer's experts under equal loads, relative to dense products with the same FLOPs.

    None for dense models and for peers.
    """
    model, ffn, tokens = variant.config.model, variant.config.model.ffn, variant.config.train.batch_tokens
    if variant.peer or not isinstance(ffn, MoEFFNConfig):
        return None
    device = pick_device()
    dtype = dtype_of(variant.config.train.precision, device)
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
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return dense_s / sparse_s


def list_pairs(shapes: list[list[str]], peers: bool) -> list[list[BenchVariant]]:
    """Each reference with each other variant of its shape; the peers of the first shape are last."""
    pairs = []
    for number, paths in enumerate(shapes):
        variants = list_variants([Path(path) for path in paths], [], None, peers and number == 0, balanced=True)
        # On a CPU peers are listed twice, with and without moelm's allocator settings.
        pairs += [[variants[0], other] for other in variants[1:] if other.keeps_memory]
    return sorted(pairs, key=lambda pair: pair[1].peer)


def write_results(out: Path, results: list[Result], left_out: list[str], rounds: int) -> None:
    """Write bench-gpu.json and bench-gpu.md."""
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"schema": 1, "device": name, "torch": torch.__version__, "rounds": rounds, "left_out": left_out}
    with atomic_file(out / "bench-gpu.json") as temporary:
        temporary.write_text(json.dumps({**about, "variants": [result.as_dict() for result in results]}, indent=1) + "\n")
    missing = f"\n\nLeft out, for lack of time: {', '.join(left_out)}." if left_out else ""
    table = markdown_table(HEAD, [result.cells() for result in results])
    with atomic_file(out / "bench-gpu.md") as temporary:
        temporary.write_text(f"{name}, torch {torch.__version__}, {rounds} rounds.\n\n{table}{missing}\n")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="one shape, instead of the two")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8.5, help="minutes within which the last pair should end")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    if options.out is not None:
        require_empty_directory(options.out).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results: list[Result] = []
    left_out: list[str] = []
    longest = 0.0
    with ProgressLine("Building the models …") as progress_line:
        for pair in list_pairs([options.configs] if options.configs else SHAPES, not options.no_peers):
            pair_started = time.monotonic()
            if pair_started - started + longest > 60 * options.minutes:
                left_out.append(pair[1].name)
            else:
                first, second = run_rounds(pair, Workload(), options.rounds, progress_line.update)
                if all(result.timing.variant != pair[0] for result in results):
                    results.append(Result(first, 1.0, relative_kernel_speed(pair[0])))
                results.append(Result(second, 1 / second.ratio_to(first), relative_kernel_speed(pair[1])))
                longest = max(longest, time.monotonic() - pair_started)
            if options.out is not None:
                write_results(options.out, results, left_out, options.rounds)
    print(markdown_table(HEAD, [result.cells() for result in results]))
    if left_out:
        log(f"Left out, for lack of time: {', '.join(left_out)}.")


if __name__ == "__main__":
    try:
        main()
    except MoelmError as error:
        print(f"bench_gpu.py: {error}", file=sys.stderr)
        sys.exit(2)
