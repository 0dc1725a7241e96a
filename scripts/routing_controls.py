"""Which figures of `moelm analyze` tell a learned router from a control that learns nothing, and what two seeds agree on.

    moelm train configs/demo-moe.yaml && moelm train configs/demo-moe.yaml name=demo-moe-1 seed=1
    moelm train configs/demo-moe.yaml name=demo-hash-0 model.ffn.router.kind=hash
    moelm train configs/demo-moe.yaml name=demo-hash-1 model.ffn.router.kind=hash seed=1
    for run in demo-moe demo-moe-1 demo-hash-0 demo-hash-1
    do moelm analyze $run --ablate all --out reports/routing-$run; done
    python scripts/routing_controls.py learned=demo-moe,demo-moe-1 hash=demo-hash-0,demo-hash-1

Printed are, for each pair of runs that differ in their seed alone, figures of both reports (means over layers), and the
agreement of their routing: experts of one run are matched with those of the other so that as many assignments as possible
are to matched experts (Kuhn 1955, the Hungarian method). Its chance level is that of random tokens: the same matching
between the routes of one run and the other's routes in random order. The match is made on one half of the text and measured
on the other.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from study import markdown_table

from moelm.analyze.collect import rank_batches, sample_rows
from moelm.distributed.ranks import SINGLE_PROCESS
from moelm.model.forward import forward_batch
from moelm.runs.load import OpenedRun, open_run


def count_pairs(runs: tuple[OpenedRun, OpenedRun], tokens: int) -> NDArray[np.int64]:
    """Assignments of one token to expert a in the first run and to expert b in the second, `(2, 2, L, E, E)`.

    By half of the text, and by whether the second run's tokens are in random order.
    """
    first, rows, counts = runs[0], runs[0].rows, None
    generator = torch.Generator().manual_seed(0)
    for number, batch, _ in rank_batches(rows, sample_rows(rows, tokens, 0), first.device, SINGLE_PROCESS):
        routings = [forward_batch(run.model, batch, run.dtype, last_only=True).routings for run in runs]
        order_M = torch.randperm(int(batch.valid_N.sum()), generator=generator)
        for index, layer in enumerate(sorted(routings[0])):
            ours, theirs = (each[layer].experts_NK[batch.valid_N] for each in routings)
            experts = routings[0][layer].num_experts
            if counts is None:
                counts = np.zeros((2, 2, len(routings[0]), experts, experts), dtype=np.int64)
            for shuffled, their_MK in enumerate((theirs, theirs[order_M])):
                pairs = (ours[:, :, None] * experts + their_MK[:, None, :]).flatten()
                added = torch.bincount(pairs, minlength=experts**2).view(experts, experts).numpy()
                counts[number % 2, shuffled, index] += added
    assert counts is not None
    return counts


def matched_share(halves: NDArray[np.int64], top_k: int) -> float:
    """Share of a token's experts in one run that its experts in the other are matched with, mean over layers.

    Args:
        halves: `(2, L, E, E)`; the match is made on the first.
    """
    shares = []
    for made_on, measured_on in zip(*halves, strict=True):
        ours, theirs = linear_sum_assignment(made_on, maximize=True)
        shares.append(measured_on[ours, theirs].sum() / (measured_on.sum() / top_k))
    return float(np.mean(shares))


def report_figures(name: str, reports: Path) -> dict[str, float]:
    """Figures of a run's report, means over layers."""
    report: dict[str, Any] = json.loads((reports / f"routing-{name}" / "routing.json").read_text())
    layers, ablated = report["layers"], report["ablation"]["layers"]
    figures = {
        "Cramér's V": [layer["association"]["all"]["cramers_v"] for layer in layers],
        "adjacent tokens with the same first expert": [layer["repetition"]["first"]["all"] for layer in layers],
        "loss with random routes in one layer": [each["routes"]["replaced"]["uniform"]["mean"] for each in ablated],
        "random routes with a higher loss": [each["routes"]["better_than_random"]["mean"] for each in ablated],
        "loss without one expert": [np.mean(each["experts"]["mask"]["loss"]) for each in ablated],
        "the same, control": [np.mean(each["experts"]["mask"]["control"]) for each in ablated],
        "rank correlation of effect and share": [each["experts"]["agreement"]["spearman"] for each in ablated],
    }
    means = {key: float(np.mean(values)) for key, values in figures.items()}
    means["pairs of expert and domain with an effect"] = sum(
        len(names) for each in ablated for names in each["experts"]["serves"]
    )
    half = report["num_experts"] // 2
    for order, curve in report["ablation"]["removal"].items():
        means[f"loss with half of the experts, selected by {order}"] = next(
            point["mean"] for point in curve if point["experts"] == half
        )
    return means


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="LABEL=RUN,RUN")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="folder of routing-RUN")
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    columns: dict[str, dict[str, str]] = {}
    for pair in arguments.pairs:
        label, _, both = pair.partition("=")
        first, second = both.split(",")
        runs = open_run(first, "last", "val"), open_run(second, "last", "val")
        counts = count_pairs(runs, arguments.tokens)
        values = [report_figures(name, arguments.reports) for name in (first, second)]
        column = {key: f"{values[0][key]:.3g}, {values[1][key]:.3g}" for key in values[0]}
        own, chance = (matched_share(counts[:, shuffled], runs[0].config.model.ffn.top_k) for shuffled in (0, 1))
        column["experts in common with the other seed, matched"] = f"{own:.3f} (random tokens {chance:.3f})"
        columns[label] = column
    head = ["", *columns]
    print(
        markdown_table(head, [[key, *(column[key] for column in columns.values())] for key in next(iter(columns.values()))])
    )


if __name__ == "__main__":
    main()
