"""A fit of the loss against the logarithm of one setting of the experts: their number, granularity, or top-k."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelm.compare.seed_std import student_t
from moelm.compare.variants import Variant
from moelm.config import MoEFFNConfig, differing, trajectory_settings
from moelm.formats import count_noun

MAY_DIFFER = {"model.ffn.num_experts", "model.ffn.top_k", "model.ffn.hidden_dim", "model.ffn.router.normalize", "seed"}
"""Settings in which the MoE variants of a fit may differ; a router cannot learn from top-1 gates that are normalized."""
SAME_WIDTH = 0.1
"""Relative difference below which widths, or total widths of all experts, count as equal."""


@dataclass(frozen=True)
class DoublingFit:
    """A straight line through the final losses of all runs, against the base-2 logarithm of one setting."""

    setting: str
    """`experts`, `granularity` or `top_k`."""
    description: str
    """The setting in a sentence."""
    values: dict[str, float]
    """The value of the setting, by variant."""
    losses: dict[str, list[float]]
    """Final losses of the runs, by variant."""
    slope: float
    """Nats per token for each doubling; negative where more is better."""
    loss_at_1: float
    """The line where the setting is 1."""
    half_width: float | None
    """Half width of the slope's 95% interval; None with too few runs."""

    @property
    def sentence(self) -> str:
        """The slope and its interval as a sentence."""
        runs = count_noun(sum(map(len, self.losses.values())), "run")
        if self.half_width is None:
            certainty = f"{runs}, too few for an interval"
        else:
            certainty = f"95%: {self.slope - self.half_width:+.3f} to {self.slope + self.half_width:+.3f}, {runs}"
        return f"Each doubling of {self.description} changes the final loss by {self.slope:+.3f} nats ({certainty})."


def fit_doubling(variants: Sequence[Variant]) -> DoublingFit | None:
    """A fit over the one setting of the experts in which variants differ; None if they differ in others too.

    The setting is the granularity (Krajewski et al. 2024) where experts are more and narrower with the same total width;
    or the number of experts of equal width (Shazeer et al. 2017, figures 2 and 3), of which a dense model has one; or else
    top-k.
    """
    ffns = {variant.name: variant.first.config.model.ffn for variant in variants}
    sparse = {name: ffn for name, ffn in ffns.items() if isinstance(ffn, MoEFFNConfig) and ffn.num_experts > 1}
    outside_ffn = {key for key in _differing_settings(variants) if not key.startswith("model.ffn.")}
    between_sparse = _differing_settings([variant for variant in variants if variant.name in sparse])
    if len(sparse) < 2 or outside_ffn - {"seed"} or between_sparse - MAY_DIFFER:
        return None
    numbers, widths = ([getattr(ffn, key) for ffn in sparse.values()] for key in ("num_experts", "hidden_dim"))
    top_ks = {name: float(ffn.top_k) for name, ffn in sparse.items()}
    same_number, same_width = _about_equal(numbers), _about_equal(widths)
    if _about_equal([number * width for number, width in zip(numbers, widths, strict=True)]) and not same_number:
        granularities = {name: max(widths) / ffn.hidden_dim for name, ffn in sparse.items()}
        return _fit("granularity", "the granularity of the experts", granularities, variants)
    if same_width and not same_number and len(set(top_ks.values())) == 1:
        counts = {name: float(sparse[name].num_experts if name in sparse else 1) for name in ffns}
        return _fit("experts", "the number of experts", counts, variants)
    if len(set(numbers)) == 1 and len(set(top_ks.values())) > 1:
        description = "the experts per token" + ("" if same_width else " (proportionally narrower)")
        return _fit("top_k", description, top_ks, variants)
    return None


def _differing_settings(variants: Sequence[Variant]) -> set[str]:
    settings = [trajectory_settings(variant.first.config) for variant in variants]
    return {key for each in settings for key in differing(each, settings[0])}


def _about_equal(sizes: Sequence[int]) -> bool:
    return max(sizes) <= (1 + SAME_WIDTH) * min(sizes)


def _fit(setting: str, description: str, values: dict[str, float], variants: Sequence[Variant]) -> DoublingFit:
    """Least squares over all runs of the variants that have a value."""
    chosen = [variant for variant in variants if variant.name in values]
    losses = [variant.final_losses for variant in chosen]
    x = np.array([np.log2(value) for value, each in zip(values.values(), losses, strict=True) for _ in each])
    y = np.concatenate(losses)
    degrees = len(y) - 2
    if len({variant.seeds for variant in chosen}) == 1:  # the effect of a seed on all variants does not change the slope
        table_VS = np.stack(losses)
        y = (table_VS - table_VS.mean(axis=0) + table_VS.mean()).ravel()
        degrees -= table_VS.shape[1] - 1
    slope, loss_at_1 = np.polyfit(x, y, 1)
    residual = y - (slope * x + loss_at_1)
    error = float(np.sqrt((residual**2).sum() / degrees / ((x - x.mean()) ** 2).sum())) if degrees > 0 else None
    return DoublingFit(
        setting=setting,
        description=description,
        values=values,
        losses={variant.name: each.tolist() for variant, each in zip(chosen, losses, strict=True)},
        slope=float(slope),
        loss_at_1=float(loss_at_1),
        half_width=None if error is None else student_t(degrees) * error,
    )
