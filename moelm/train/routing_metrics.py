"""Routing statistics of a batch, for metrics.jsonl."""

from typing import Any

import torch
from torch import Tensor

from moelm.model.moe import balance
from moelm.model.moe.balance import LayerSums, Sums, add_sums, map_layer_sums


class RoutingStatistics:
    """Routing sums and balance losses, accumulated over micro-batches."""

    def __init__(self) -> None:
        self.layers: LayerSums = {}

    def add(self, sums: LayerSums, losses: LayerSums) -> None:
        """Add one micro-batch."""
        for layer, own in sums.items():
            previous = [self.layers[layer]] if layer in self.layers else []
            self.layers[layer] = add_sums([*previous, {**own, **losses.get(layer, {})}])

    def as_metrics(self) -> dict[str, Any]:
        """Means over layers under `moe/...`, and each layer's values under `moe/layers`."""
        if not self.layers:
            return {}
        rows = [_layer_metrics(layer, sums) for layer, sums in map_layer_sums(self.layers, _to_host).items()]
        names = [name for name in rows[0] if name not in ("layer", "load")]
        means = {f"moe/{name}": sum(row[name] for row in rows) / len(rows) for name in names}
        return means | {"moe/layers": rows}


def _layer_metrics(layer: int, sums: Sums) -> dict[str, Any]:
    load_E = sums["counts"] / sums["counts"].sum()
    row = {
        "layer": layer,
        "load": [round(share, 6) for share in load_E.tolist()],
        "load_max_over_mean": float(load_E.max() * load_E.numel()),
        "load_cv": float(balance.squared_variation(load_E).sqrt()),
        "importance_cv": float(balance.squared_variation(sums["importance"]).sqrt()),
        "entropy": float(sums["entropy"] / sums["tokens"]),
        "dead_experts": int((load_E == 0).sum()),
    }
    # Losses with zero weight are logged too, computed on the whole batch.
    row["aux_loss"] = float(sums["aux_loss"] if "aux_loss" in sums else balance.aux_loss(sums))
    row["z_loss"] = float(balance.z_loss(sums)) if "z" in sums else 0.0
    if "load" in sums:
        row["smooth_load_cv"] = float(balance.load_loss(sums).sqrt())
    if "dropped" in sums:
        row["dropped"] = float(sums["dropped"] / sums["counts"].sum())
    return row


def _to_host(values: list[Tensor]) -> list[Tensor]:
    packed = torch.cat([value.flatten().double() for value in values]).cpu()
    parts = torch.split(packed, [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
