"""The best learning rate at several widths, with `mup` and with the standard parametrization.

    python scripts/rate_study.py configs/demo-dense.yaml configs/demo-moe.yaml --out docs/images

Every config is trained at each width with rates that are a factor sqrt(2) apart, at first two above and two below its own;
rates are added until the best is none of the outermost. A parabola through the best rate's loss and two on each side, by
least squares over the logarithm of the rate, gives the best rate between them. Printed are the best rate by width, of the
mean over seeds and of each seed, and the largest ratio of best rates between two widths. `--out` draws rates.png.
Interrupted, the study continues; finished runs are only read. Both rates, `optim.lr` and `optim.adamw.lr`, are changed.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from study import markdown_table, run_variants, width_overrides, width_parser, write_figure

from moelm.config import load_config
from moelm.report.figures import COLORS

SIDE = 2
"""Rates on each side of the best one that are trained and fitted."""
FARTHEST = 10
"""Largest distance from the config's own rate, in factors of sqrt(2)."""


class Best(NamedTuple):
    """The losses at one width, and the best rate as a factor on the config's."""

    losses: dict[int, list[float]]
    """Final validation loss of each seed, by the power of sqrt(2)."""
    factor: float
    of_seeds: list[float]


def vertex(losses: dict[int, float]) -> float:
    """The power of sqrt(2) at which a parabola through the losses near the smallest has its minimum.

    Where they are not convex, it is that of the smallest loss.
    """
    best = min(losses, key=lambda power: losses[power])
    near = [power for power in losses if abs(power - best) <= SIDE]
    curvature, slope, _ = np.polyfit(near, [losses[power] for power in near], 2)
    if curvature <= 0:
        return float(best)
    return float(np.clip(-slope / (2 * curvature), min(near), max(near)))


def find_best(train: Callable[[int], list[float]]) -> Best:
    """Train with more and more rates until the best has `SIDE` others on each side.

    Args:
        train: the losses of all seeds at a power of sqrt(2).
    """
    losses: dict[int, list[float]] = {}
    wanted = list(range(-SIDE, SIDE + 1))
    while wanted:
        losses |= {power: train(power) for power in wanted}
        best = min(losses, key=lambda power: float(np.mean(losses[power])))
        wanted = [power for power in range(best - SIDE, best + SIDE + 1) if power not in losses and abs(power) <= FARTHEST]
    losses = dict(sorted(losses.items()))
    seeds = range(len(losses[0]))
    of_mean = vertex({power: float(np.mean(values)) for power, values in losses.items()})
    of_seeds = [vertex({power: values[seed] for power, values in losses.items()}) for seed in seeds]
    return Best(losses, math.sqrt(2) ** of_mean, [math.sqrt(2) ** power for power in of_seeds])


def study(path: Path, parametrization: str, width: int, seeds: int, shared: list[str]) -> Best:
    """The best rate of one config at one width."""
    config = load_config(path, shared)
    own = width_overrides(config, width, parametrization)

    def train(power: int) -> list[float]:
        factor = math.sqrt(2) ** power
        rates = [f"optim.lr={config.optim.lr * factor:.5g}"]
        if config.optim.adamw.lr is not None:
            rates.append(f"optim.adamw.lr={config.optim.adamw.lr * factor:.5g}")
        variants = {str(seed): [*own, *rates, f"seed={seed}"] for seed in range(100, 100 + seeds)}
        name = f"rates-{config.name}-{parametrization}-{width}-lr{power}"
        return [variant.val_loss for variant in run_variants(path, variants, [*shared, f"name={name}"])]

    return find_best(train)


def draw(results: dict[tuple[str, str], dict[int, Best]]) -> Figure:
    """Loss against the rate, a line for each width."""
    figure = Figure(figsize=(4.2 * len(results) / 2, 6.4), layout="constrained")
    axes = figure.subplots(2, len(results) // 2, squeeze=False, sharex=True)
    for axis, ((name, parametrization), by_width) in zip(axes.T.flat, results.items(), strict=True):
        for color, (width, best) in zip(COLORS[1:], by_width.items(), strict=False):
            factors = [math.sqrt(2) ** power for power in best.losses]
            axis.plot(
                factors, [np.mean(losses) for losses in best.losses.values()], color=color, marker="o", label=str(width)
            )
            axis.axvline(best.factor, color=color, alpha=0.5, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{name}, {parametrization}")
        axis.set_ylabel("validation loss")
    axes[0][0].legend(title="width")
    figure.supxlabel("learning rate, as a factor on the config's", fontsize=10.5)
    return figure


def main() -> None:
    parser = width_parser(__doc__, widths="32,64,128", seeds=2)
    parser.add_argument("--parametrizations", default="mup,standard")
    arguments = parser.parse_args()
    widths = [int(width) for width in arguments.widths.split(",")]
    results = {
        (path.stem, parametrization): {
            width: study(path, parametrization, width, arguments.seeds, ["data.split_seed=1", *arguments.set])
            for width in widths
        }
        for path in arguments.configs
        for parametrization in arguments.parametrizations.split(",")
    }
    rows = []
    for (name, parametrization), by_width in results.items():
        factors = [best.factor for best in by_width.values()]
        cells = [f"{best.factor:.2f} ({', '.join(f'{each:.2f}' for each in best.of_seeds)})" for best in by_width.values()]
        rows.append([name, parametrization, *cells, f"{max(factors) / min(factors):.2f}"])
    print(markdown_table(["config", "parametrization", *map(str, widths), "largest ratio"], rows))
    if arguments.out is not None:
        write_figure(arguments.out / "rates.png", lambda: draw(results))


if __name__ == "__main__":
    main()
