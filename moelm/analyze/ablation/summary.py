"""Results of ablations as routing.json has them; docs/analysis.md documents the keys.

Shapes: E experts, L sparse layers, D documents, G domains.
"""

from typing import Any

import numpy as np

from moelm.analyze.ablation.capacity import CapacitySums
from moelm.analyze.ablation.experts import KINDS, ExpertSums
from moelm.analyze.ablation.routes import RouteSums, replacements
from moelm.analyze.ablation.statistics import (
    DISCOVERY_RATE,
    Floats,
    Means,
    discoveries,
    means_by_documents,
    rank_correlation,
    sums_by_domain,
)
from moelm.analyze.ablation.text import AblationText
from moelm.analyze.counts import UNIT, Ints


class DomainMeans:
    """Means over the tokens of a text and of each of its domains."""

    def __init__(self, text: AblationText) -> None:
        self._text = text
        self.present = np.unique(text.domains).tolist()
        self.names = [text.rows.split.domains[g] for g in self.present]

    def means(self, sums_CD: Floats, domain: int | None = None) -> Means:
        """Means over the tokens of a domain, or of the whole text.

        Args:
            sums_CD: sums by document.
            domain: its number in the split.
        """
        member_D = np.ones(len(self._text.tokens), dtype=bool) if domain is None else self._text.domains == domain
        return means_by_documents(sums_CD[:, member_D], self._text.tokens[member_D])

    def shares(self, load_ED: Ints) -> dict[str, list[float]]:
        """Share of each domain's assignments by expert."""
        load_EG = sums_by_domain(load_ED, self._text.domains, self.present)
        return {name: (load_E / load_E.sum()).tolist() for name, load_E in zip(self.names, load_EG.T, strict=True)}

    def as_dict(self, sums_D: Floats) -> dict[str, Any]:
        """The mean with its interval, over the whole text and by domain."""
        by_domain = {name: self.means(sums_D[None], g).as_dict(0) for g, name in zip(self.present, self.names, strict=True)}
        return {**self.means(sums_D[None]).as_dict(0), "domains": by_domain}


def routes_summary(routes: RouteSums, text: AblationText) -> list[dict[str, Any]]:
    """The key `routes` of each layer."""
    over_text = DomainMeans(text)
    layers = []
    for index in range(routes.replaced.shape[1]):
        replaced = zip(replacements(text.model.config), routes.replaced[:, index] * UNIT, strict=True)
        own_better = means_by_documents(routes.better[[index]] * UNIT, routes.sampled)
        regret = means_by_documents(routes.regret[:, index] * UNIT, routes.sampled)
        layers.append(
            {
                "replaced": {name: over_text.as_dict(sums_D) for name, sums_D in replaced},
                "better_than_random": own_better.as_dict(0),
                "shares": over_text.shares(routes.load[index]),
                "regret": {"own": regret.as_dict(0), "random": regret.as_dict(1)},
            }
        )
    return layers


def experts_summary(experts: ExpertSums, routes: RouteSums, text: AblationText, seed: int) -> list[dict[str, Any]]:
    """The key `experts` of each layer.

    Args:
        seed: of the bootstrap.
    """
    over_text, rng = DomainMeans(text), np.random.default_rng(seed)
    _, layers, num_experts, documents = experts.ablated.shape
    summaries: list[dict[str, Any]] = [{} for _ in range(layers)]
    for kind, kind_name in enumerate(KINDS):
        ablated, control = (each[kind].reshape(-1, documents) * UNIT for each in (experts.ablated, experts.control))
        excess = [over_text.means(ablated - control, g) for g in over_text.present]
        found = discoveries(np.stack([means.p for means in excess]))
        found &= np.stack([means.mean > 0 for means in excess])
        found = found.reshape(-1, layers, num_experts)
        parts = [
            (means, over_text.means(ablated, g), over_text.means(control, g))
            for means, g in zip(excess, over_text.present, strict=True)
        ]
        overall = over_text.means(ablated).mean.reshape(layers, -1), over_text.means(control).mean.reshape(layers, -1)
        for index, summary in enumerate(summaries):
            cells = slice(index * num_experts, (index + 1) * num_experts)
            summary[kind_name] = {
                "loss": overall[0][index].tolist(),
                "control": overall[1][index].tolist(),
                "domains": {
                    name: {
                        "loss": own.mean[cells].tolist(),
                        "control": random.mean[cells].tolist(),
                        "half_width": [float(w) if np.isfinite(w) else None for w in means.half_width[cells]],
                        "p": means.p[cells].tolist(),
                        "effect": found[g, index].tolist(),
                    }
                    for g, (name, (means, own, random)) in enumerate(zip(over_text.names, parts, strict=True))
                },
            }
    masked = (experts.ablated - experts.control)[0] * UNIT
    for index, summary in enumerate(summaries):
        by_domain = summary["mask"]["domains"]
        summary["serves"] = [
            [name for name, cells in by_domain.items() if cells["effect"][expert]] for expert in range(num_experts)
        ]
        summary["agreement"] = rank_correlation(
            routes.load[index],
            masked[index],
            text.tokens,
            text.domains,
            over_text.present,
            rng,
        )
    return summaries


def count_effects(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """How many cells of layer, expert and domain are effects, by kind of ablation."""
    counts: dict[str, Any] = {"discovery_rate": DISCOVERY_RATE, "cells": 0}
    for kind in KINDS:
        cells = [domain for layer in layers for domain in layer[kind]["domains"].values()]
        counts["cells"] = sum(len(cell["effect"]) for cell in cells)
        counts[kind] = sum(sum(cell["effect"]) for cell in cells)
    return counts


def capacity_summary(capacity: CapacitySums, text: AblationText) -> dict[str, Any]:
    """The keys `top_k` and `removal`: differences of the loss from the unchanged model's."""
    over_text = DomainMeans(text)

    def curve(name: str, by_count: dict[int, Any]) -> list[dict[str, Any]]:
        return [
            {name: count, **over_text.means(sums_D[None] * UNIT).as_dict(0)} for count, sums_D in sorted(by_count.items())
        ]

    return {
        "top_k": curve("top_k", capacity.by_top_k),
        "removal": {order: curve("experts", by_count) for order, by_count in capacity.by_removal.items()},
    }
