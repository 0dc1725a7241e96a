"""Continued training of a dense run compared with that of sparse models upcycled from it, on the same new batches.

    python scripts/upcycle_study.py demo-dense

Upcycled experts are exact copies of the dense block (`copies`), copies with noise (`noise`), or copies with half of the
hidden units of each reinitialized (`half reinitialized`). All variants have the same schedule and, for each seed, the same
batches. Printed are training FLOPs per token, validation losses (means over seeds) at each evaluation, and the difference
between the worst and the best seed at the end. Arguments after the options are config overrides of all variants.
"""

import argparse
from pathlib import Path
from statistics import mean

from study import Variant, markdown_table, run_variants

from moelm.runs.directory import RunDirectory
from moelm.upcycle import upcycle_run

UPCYCLINGS = {"copies": {}, "noise": {"noise": 0.1}, "half reinitialized": {"reinit": 0.5}}
STEPS = ["train.steps=600", "train.eval_every=100"]
OPTIMIZER = ["optim.lr=0.005", "optim.adamw.lr=0.006", "optim.warmup_steps=50"]
"""A quarter of the demo's rates: the dense run has ended its decay."""


def losses_by_step(seeds: list[Variant]) -> dict[int, list[float]]:
    """Validation losses of all seeds by step."""
    losses: dict[int, list[float]] = {}
    for variant in seeds:
        for line in variant.lines:
            if "val/loss" in line:
                losses.setdefault(line["step"], []).append(line["val/loss"])
    return losses


def table_row(label: str, seeds: list[Variant]) -> list[str]:
    losses = losses_by_step(seeds)
    last = seeds[0].lines[-1]
    seed_range = max(losses[last["step"]]) - min(losses[last["step"]])
    means = [f"{mean(values):.4f}" for values in losses.values()]
    return [label, f"{last['flops'] / last['tokens'] / 1e6:.1f}", *means, f"{seed_range:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished dense run")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()

    def train_seeds(label: str, initial: RunDirectory, checkpoint: str) -> list[Variant]:
        shared = [
            *STEPS,
            *OPTIMIZER,
            *arguments.overrides,
            "name=upcycle-study",
            f"init_from={{run: {initial.path}, checkpoint: '{checkpoint}'}}",
        ]
        name = label.replace(" ", "-")
        # Seed 0 is the dense run's own: it would train on its first batches again.
        seeds = {f"{name}-{seed}": [f"seed={seed}"] for seed in range(1, arguments.seeds + 1)}
        return run_variants(initial.config, seeds, shared)

    dense = RunDirectory.find(arguments.run)
    variants = {"dense": train_seeds("dense", dense, "last")}
    for label, options in UPCYCLINGS.items():
        name = f"{dense.path.name}-{label.replace(' ', '-')}"
        upcycled = RunDirectory(Path("runs") / name)
        if not upcycled.path.exists():
            upcycle_run(dense.path, name, arguments.num_experts, arguments.top_k, **options)
        variants[label] = train_seeds(label, upcycled, "0")
    steps = losses_by_step(variants["dense"])
    headings = ["", "MFLOPs per token", *(f"step {step}" for step in steps), "range over seeds at the end"]
    print(markdown_table(headings, [table_row(label, seeds) for label, seeds in variants.items()]))


if __name__ == "__main__":
    main()
