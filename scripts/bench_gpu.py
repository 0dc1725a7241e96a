"""What is to be known of speed on one GPU, in one table: dense against 8 and 64 experts at equal active parameters,
their peers in Hugging Face's library, and the experts' kernels against one dense product of the same FLOPs.

    python scripts/bench_gpu.py            # on a GPU
    python scripts/bench_gpu.py configs/bench-dense.yaml configs/bench-moe.yaml    # other shapes, any machine

The first config is the dense one.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moelm.bench import Contestant, enter, run_contest
from moelm.bench.jobs import Work
from moelm.bench.models import shape_of
from moelm.config import MoEFFNConfig
from moelm.console import Ticker
from moelm.hardware import dtype_of, pick_device
from moelm.model.gated import gated_experts

CONFIGS = [f"configs/gpu-{name}.yaml" for name in ("dense", "moe8", "moe64")]


def seconds(job: Callable[[], Tensor], learned: list[Tensor], device: torch.device, times: int = 20) -> float:
    """The middle time of a forward and backward pass."""
    taken = []
    for _ in range(times + 3):
        began = time.perf_counter()
        y = job()
        torch.autograd.grad(y, learned, torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return median(taken[3:])


def kernel_share(entry: Contestant) -> float:
    """Speed of a layer's experts, evenly loaded, as a share of one dense block's products of the same FLOPs."""
    device = pick_device()
    dtype = dtype_of(entry.config.train.precision, device)
    shape, ffn, tokens = shape_of(entry.config), entry.config.model.ffn, entry.config.train.batch_tokens
    assert isinstance(ffn, MoEFFNConfig)
    dim, hidden, experts, top_k = shape.dim, ffn.hidden_dim, ffn.num_experts, ffn.top_k

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(0.02).requires_grad_()

    rows = tokens * top_k
    x, gates = random(rows, dim), torch.ones(rows, device=device)
    weights = (random(experts, hidden, dim), random(experts, dim, hidden), random(experts, hidden, dim))
    ends = torch.arange(1, experts + 1, device=device) * (rows // experts)
    sparse = torch.compile(gated_experts) if device.type == "cuda" else gated_experts
    experts_s = seconds(lambda: sparse(x, ends, weights, shape.activation, gates), [x, *weights], device)
    wide, up, down = random(tokens, dim), random(2 * top_k * hidden, dim), random(dim, top_k * hidden)
    hidden_act = random(tokens, top_k * hidden)
    dense_s = seconds(lambda: wide @ up.t(), [wide, up], device)
    dense_s += seconds(lambda: hidden_act @ down.t(), [hidden_act, down], device)
    return dense_s / experts_s


def main() -> None:
    """Run it all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-peers", action="store_true")
    asked = parser.parse_args()
    entries = enter([Path(config) for config in asked.configs], [], None, peers=not asked.no_peers)
    kernels = {e.name: kernel_share(e) for e in entries if not e.peer and isinstance(e.config.model.ffn, MoEFFNConfig)}
    with Ticker("Starting the contestants …") as ticker:
        timings = run_contest(entries, Work(), asked.rounds, ticker.update)
    table = Table("contestant", "precision", box=None, header_style="")
    for heading in ("ms/step", "tokens/s", "of the first", "MFU", "peak MiB", "expert kernels, of a dense GEMM"):
        table.add_column(heading, justify="right")
    for timing in timings:
        told = timing.as_dict()
        share = kernels.get(timing.entry.name)
        table.add_row(
            timing.entry.name,
            told["precision"],
            f"{1e3 * told['step_s']:,.1f}",
            f"{told['tokens_per_s']:,.0f}",
            f"{1 / timing.times(timings[0]):.2f}",
            f"{told['mfu']:.1%}",
            f"{timing.memory / 2**20:,.0f}",
            f"{share:.0%}" if share is not None else "",
        )
    Console(highlight=False, width=140).print(table)


if __name__ == "__main__":
    main()
