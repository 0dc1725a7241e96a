"""Table 6 of Shazeer et al. 2017 at small scale: the effect of the importance and load losses on noisy gates.

    python scripts/reproduce_shazeer_table6.py --out docs

Trains configs/shazeer-table6.yaml under the paper's six weightings on the same batches (arguments after the options are
overrides for all of them), prints the table beside the paper's, checks its shape and plots it.
"""

import argparse
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure
from study import Variant, markdown_table, run_variants, write_figure

CONFIG = Path(__file__).parents[1] / "configs/shazeer-table6.yaml"
PAPER = {
    (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
    (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
    (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
    (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
    (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
    (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
}
"""Weights of importance and load: test perplexity, CV(Importance), CV(Load), max/mean load; 256 experts, top-4."""


def normalized(ratio: float, experts: int, k: int) -> float:
    """(r - 1) / (E/k - 1): 0 is balanced, 1 is all tokens on the same k experts."""
    return (ratio - 1) / (experts / k - 1)


def table(variants: list[Variant], experts: int, k: int) -> str:
    head = ["w_importance", "w_load", "perplexity", "CV(Imp)", "CV(Load)", "max/mean", "normalized"]
    head += [f"paper: {name}" for name in head[2:]]
    rows = []
    for (weights, paper), variant in zip(PAPER.items(), variants, strict=True):
        ratio = variant.mean("moe/load_max_over_mean")
        ours = [math.exp(variant.val_loss), variant.mean("moe/importance_cv"), variant.mean("moe/load_cv"), ratio]
        cells = [f"{weight:g}" for weight in weights]
        for figures, size, top in ((ours, experts, k), (paper, 256, 4)):
            cells += [f"{figures[0]:.1f}", *(f"{value:.2f}" for value in figures[1:])]
            cells.append(f"{normalized(figures[3], size, top):.3f}")
        rows.append(cells)
    return markdown_table(head, rows)


def broken_shapes(variants: list[Variant], experts: int, k: int) -> list[str]:
    """What of the paper's shape does not hold, in words."""
    ratio = dict(zip(PAPER, (variant.mean("moe/load_max_over_mean") for variant in variants), strict=True))
    importance = dict(zip(PAPER, (variant.mean("moe/importance_cv") for variant in variants), strict=True))
    wrong = [
        f"weights {weights} leave max/mean at {ratio[weights]:.2f}, above 1.5"
        for weights in PAPER
        if any(weights) and ratio[weights] > 1.5
    ]
    if ratio[1.0, 1.0] > 1.2:
        wrong.append(f"weights of 1 leave max/mean at {ratio[1.0, 1.0]:.2f}, above 1.2")
    if normalized(ratio[0.0, 0.0], experts, k) < 0.15:
        wrong.append(f"without losses max/mean is {ratio[0.0, 0.0]:.2f}, which is no clear imbalance")
    if min(importance, key=importance.__getitem__) != (1.0, 1.0):
        wrong.append("CV(Importance) is not smallest where its weight is largest")
    return wrong


def draw(variants: list[Variant]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    over_time, at_end = figure.subplots(1, 2)
    for weights, variant in zip(PAPER, variants, strict=True):
        label = f"importance {weights[0]:g}, load {weights[1]:g}"
        steps = [line["step"] for line in variant.lines]
        over_time.plot(steps, [line["moe/load_max_over_mean"] for line in variant.lines], label=label, linewidth=1)
        load = variant.load().mean(axis=0)
        at_end.plot(range(1, len(load) + 1), sorted(load * len(load), reverse=True), label=label)
    over_time.set(xlabel="step", ylabel="max / mean load of a batch", yscale="log")
    at_end.set(xlabel="expert, by load", ylabel="load / mean load, last tenth of the run", yscale="log")
    at_end.legend(frameon=False, fontsize=8)
    for axes in (over_time, at_end):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/shazeer-table6"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    weightings = {
        f"{importance:g}-{load:g}": (f"model.ffn.balance.importance={importance}", f"model.ffn.balance.load={load}")
        for importance, load in PAPER
    }
    variants = run_variants(CONFIG, weightings, arguments.overrides)
    experts, k = len(variants[0].load()[0]), 2
    text = table(variants, experts, k)
    print(text)
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    write_figure(arguments.out / "images/shazeer-table6.png", lambda: draw(variants))
    wrong = broken_shapes(variants, experts, k)
    print("\n".join(wrong) if wrong else "The paper's shape holds.")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
