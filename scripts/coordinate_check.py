"""Coordinate check: how the sizes of activations depend on the width, with `mup` and with the standard parametrization.

    python scripts/coordinate_check.py configs/demo-dense.yaml configs/demo-moe.yaml --out docs/images

Every config is trained for a few steps at several widths, at a constant part of its learning rate; the number of heads and
the hidden units grow with the width. After each step the root mean squares of activations are measured on validation rows:
the outputs of blocks, attention and feed-forward layers (the mean of their logarithms over layers), and those parts of the
logits and router logits that updates of their matrix have added; what the initial matrix gives is meant to become smaller
with the width. Printed is the slope of log size, mean over steps and seeds, on log width. `--out` draws a figure of sizes.
"""

import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from study import width_overrides, width_parser, write_figure
from torch import Tensor, nn

from moelm.config import RunConfig, load_config
from moelm.data.loader import PreparedData, TrainOrder, open_folder
from moelm.data.prepare import prepare
from moelm.model import build_model
from moelm.model.forward import forward_batch
from moelm.report.figures import COLORS
from moelm.train.objective import micro_batch_loss
from moelm.train.optimizer import build_optimizer

PARTS = ("block outputs", "attention", "feed-forward", "logits", "router logits")
Sizes = dict[str, list[float]]
"""Mean log size after each step, by part."""


def log_size(x: Tensor) -> float:
    return 0.5 * math.log(float(x.double().square().mean()))


def measure(config: RunConfig, data: PreparedData, seed: int, steps: int, lr: float) -> Sizes:
    """Train for some steps at a constant rate, and measure after each."""
    vocab_size = data.tokenizer.vocab_size
    model = build_model(config.model.model_copy(update={"vocab_size": vocab_size}), seed)
    optimizer = build_optimizer(model, config.optim, torch.float32)
    optimizer.set_lr(lr)
    order = TrainOrder(len(data.train), config.batch_rows, seed)
    probe = data.val.batch(np.arange(min(len(data.val), config.batch_rows)))
    watched: dict[str, list[Tensor]] = defaultdict(list)

    def watch(module: nn.Module, part: str) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            watched[part].append(output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(hook)

    routers = [block.ffn.router for block in model.blocks if hasattr(block.ffn, "router")]
    for block in model.blocks:
        watch(block, "block outputs")
        watch(block.attention, "attention")
        watch(block.ffn, "feed-forward")
    watch(model.norm, "last")
    for router in routers:
        router.register_forward_pre_hook(lambda _, inputs: watched["router inputs"].append(inputs[0]))
    head = model.embedding.weight if model.head is None else model.head.weight
    matrices = [head, *(router.weight for router in routers)]
    initial = [matrix.detach().clone() for matrix in matrices]

    sizes: Sizes = defaultdict(list)
    for step in range(steps):
        batch = data.train.batch(order.rows(step))
        output = forward_batch(model, batch, torch.float32, losses=True)
        balance = getattr(config.model.ffn, "balance", None)
        micro_batch_loss(output, batch, None, batch.valid_BT.sum(), balance).total.backward()
        optimizer.step(squares=optimizer.gradient_squares().tolist())
        optimizer.zero_grad()
        watched.clear()
        with torch.no_grad():
            forward_batch(model, probe, torch.float32)
            inputs = [watched.pop("last")[0] * config.model.logit_multiplier, *watched.pop("router inputs", [])]
            for part, outputs in watched.items():
                sizes[part].append(float(np.mean([log_size(each) for each in outputs])))
            added = [x @ (matrix - start).T for x, matrix, start in zip(inputs, matrices, initial, strict=True)]
            # A number that is added to all logits of a token changes nothing.
            added_sizes = [log_size(each - each.mean(dim=-1, keepdim=True)) for each in added]
            sizes["logits"].append(added_sizes[0])
            if routers:
                sizes["router logits"].append(float(np.mean(added_sizes[1:])))
    return sizes


def mean_sizes(config: RunConfig, data: PreparedData, seeds: int, steps: int, lr: float) -> Sizes:
    runs = [measure(config, data, seed, steps, lr) for seed in range(seeds)]
    return {part: np.mean([run[part] for run in runs], axis=0).tolist() for part in PARTS if part in runs[0]}


def slopes(by_width: dict[int, Sizes]) -> dict[str, float]:
    """The slope of log size, mean over steps, on log width, by part."""
    log_widths = np.log(list(by_width))
    return {
        part: float(np.polyfit(log_widths, [np.mean(sizes[part]) for sizes in by_width.values()], 1)[0])
        for part in next(iter(by_width.values()))
    }


def draw(results: dict[str, dict[int, Sizes]]) -> Figure:
    """Sizes after each step against the width: a row for each config and parametrization, a column for each part."""
    figure = Figure(figsize=(2.2 * len(PARTS), 1.9 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), len(PARTS), squeeze=False, sharex=True, sharey=True)
    for row, (label, by_width) in zip(axes, results.items(), strict=True):
        widths = list(by_width)
        for axis, part in zip(row, PARTS, strict=True):
            if part not in by_width[widths[0]]:
                axis.set_visible(False)
                continue
            sizes_WS = np.exp([by_width[width][part] for width in widths])
            for step, sizes_W in enumerate(sizes_WS.T):
                axis.plot(widths, sizes_W, color=COLORS[2], alpha=0.25 + 0.75 * step / sizes_WS.shape[1])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(widths, [str(width) for width in widths])
            axis.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
        row[0].set_ylabel(label)
    for column, part in zip(axes.T, PARTS, strict=True):
        next(axis for axis in column if axis.get_visible()).set_title(part, fontsize=10.5)
    figure.supxlabel("width (model.dim); darker lines are later steps", fontsize=10.5)
    return figure


def main() -> None:
    parser = width_parser(__doc__, widths="32,64,128,256", seeds=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr-part", type=float, default=0.25, help="of the peak learning rate")
    parser.add_argument("--json", action="store_true", help="print slopes and sizes as JSON")
    arguments = parser.parse_args()
    results: dict[str, dict[int, Sizes]] = {}
    for path in arguments.configs:
        config = load_config(path, arguments.set)
        data = open_folder(config, prepare(config.data)[0])
        for parametrization in ("mup", "standard"):
            results[f"{config.name}\n{parametrization}"] = {
                width: mean_sizes(
                    load_config(path, [*arguments.set, *width_overrides(config, width, parametrization)]),
                    data,
                    arguments.seeds,
                    arguments.steps,
                    arguments.lr_part * config.optim.lr,
                )
                for width in map(int, arguments.widths.split(","))
            }
    found = {label.replace("\n", " "): slopes(by_width) for label, by_width in results.items()}
    if arguments.json:
        print(json.dumps({"slopes": found, "log_sizes": results}))
    else:
        for label, by_part in found.items():
            print(f"{label}: {', '.join(f'{part} {slope:+.2f}' for part, slope in by_part.items())}")
    if arguments.out is not None:
        write_figure(arguments.out / "mup-coordinates.png", lambda: draw(results))


if __name__ == "__main__":
    main()
