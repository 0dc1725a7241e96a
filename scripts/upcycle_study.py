"""A dense run goes on as it is and as a mixture of experts made of it (sparse upcycling), on the same further batches.

    python scripts/upcycle_study.py demo-dense

Upcycled experts are copies of the dense block: exact (`copies`), with noise (`noise`), or with half of the hidden units
of each drawn anew (`half anew`). All contestants have the schedule and, for each seed, the batches in common. Printed:
training FLOPs of a token, validation losses (means over seeds) along the way, and the distance of the best seed from the
worst at the end. Words after the options are overrides for all of them.
"""

import argparse
from pathlib import Path
from statistics import mean

from study import Variant, markdown_table, run_variants

from moelm.interop.upcycle import upcycle_run
from moelm.rundir import RunDirectory

WAYS = {"copies": {}, "noise": {"noise": 0.1}, "half anew": {"reinit": 0.5}}
SCHEDULE = ["train.steps=600", "train.eval_every=100", "optim.lr=1e-3", "optim.warmup_steps=50"]


def losses(seeds: list[Variant]) -> dict[int, list[float]]:
    """Validation losses of all seeds by step."""
    found: dict[int, list[float]] = {}
    for variant in seeds:
        for line in variant.lines:
            if "val/loss" in line:
                found.setdefault(line["step"], []).append(line["val/loss"])
    return found


def row(label: str, seeds: list[Variant]) -> list[str]:
    found = losses(seeds)
    last = seeds[0].lines[-1]
    spread = max(found[last["step"]]) - min(found[last["step"]])
    cells = [f"{mean(values):.4f}" for values in found.values()]
    return [label, f"{last['flops'] / last['tokens'] / 1e6:.1f}", *cells, f"{spread:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished dense run")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    words = parser.parse_args()

    def go_on(label: str, start: RunDirectory, checkpoint: str) -> list[Variant]:
        shared = [
            *SCHEDULE,
            *words.overrides,
            "name=upcycle-study",
            f"start={{run: {start.path}, checkpoint: '{checkpoint}'}}",
        ]
        name = label.replace(" ", "-")
        # Seed 0 is the dense run's own: its first batches would be met twice.
        return run_variants(
            start.config, {f"{name}-{seed}": [f"seed={seed}"] for seed in range(1, words.seeds + 1)}, shared
        )

    dense = RunDirectory.find(words.run)
    results = {"dense": go_on("dense", dense, "last")}
    for label, way in WAYS.items():
        name = f"{dense.path.name}-{label.replace(' ', '-')}"
        made = Path("runs") / name
        start = (
            RunDirectory(made) if made.exists() else upcycle_run(dense.path, name, words.num_experts, words.top_k, **way)
        )
        results[label] = go_on(label, start, "0")
    steps = list(losses(results["dense"]))
    head = ["", "MFLOPs a token", *(f"step {step}" for step in steps), "spread at the end"]
    print(markdown_table(head, [row(label, seeds) for label, seeds in results.items()]))


if __name__ == "__main__":
    main()
