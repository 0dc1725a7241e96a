"""What sets the noisy gates of 2017 apart from a plain top-k router: the noise, the start from zero, or neither?

    python scripts/noisy_gates_study.py CONFIG [KEY=VALUE]...

Trained on the same batches, for each seed: `topk` with the Switch loss and the z-loss; the gates of 2017, with noise, zero
initial gates, importance and load losses; and these without the noise, with random initial gates, and with neither. Printed
are validation losses at each evaluation, means over seeds, and how far each gate is ahead of `topk` at the end.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from study import Variant, markdown_table, run_variants
from torch import Tensor

from moelm.model.moe import noisy_router
from moelm.model.moe.noisy_router import NoisyTopKRouter

GATES = {
    "topk": (True, True),
    "noisy": (True, True),
    "no noise": (False, True),
    "random start": (True, False),
    "neither": (False, False),
}
"""Whether the noisy gates have their noise and start from zero."""


def clean_logits(clean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """Instead of `noisy_logits`."""
    return clean


@contextmanager
def gates(noise: bool, zero_start: bool) -> Iterator[None]:
    """Change the noisy router within the block."""
    original = noisy_router.noisy_logits, NoisyTopKRouter.zero_init
    noisy_router.noisy_logits = original[0] if noise else clean_logits
    NoisyTopKRouter.zero_init = zero_start
    try:
        yield
    finally:
        noisy_router.noisy_logits, NoisyTopKRouter.zero_init = original


def losses(variant: Variant) -> dict[int, float]:
    """Validation losses by step."""
    return {line["step"]: line["val/loss"] for line in variant.lines if "val/loss" in line}


def main() -> None:
    """Train the variants, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of a mixture")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all variants")
    arguments = parser.parse_intermixed_args()
    found: dict[str, list[dict[int, float]]] = {}
    for label, (noise, zero_start) in GATES.items():
        kind = "topk" if label == "topk" else "noisy_topk"
        own = [f"model.ffn.router.kind={kind}", f"name=noisy-gates-{label.replace(' ', '-')}"]
        seeds = {str(seed): [f"seed={seed}"] for seed in range(arguments.seeds)}
        with gates(noise, zero_start):
            trained = run_variants(arguments.config, seeds, [*arguments.overrides, *own])
        found[label] = [losses(variant) for variant in trained]
    steps = list(found["topk"][0])
    rows = []
    for label, by_seed in found.items():
        means = [f"{np.mean([each[step] for each in by_seed]):.3f}" for step in steps]
        ahead = [reference[steps[-1]] - each[steps[-1]] for reference, each in zip(found["topk"], by_seed, strict=True)]
        rows.append([label, *means, ", ".join(f"{each:+.3f}" for each in ahead)])
    print(markdown_table(["gates", *(f"step {step}" for step in steps), "ahead by, each seed"], rows))


if __name__ == "__main__":
    main()
