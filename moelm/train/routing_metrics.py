"""Routing statistics of a batch, for metrics.jsonl."""

from typing import Any

from moelm.model.moe import balance
from moelm.model.moe.balance import LayerSums, Sums, add_layer_sums


def add_statistics(earlier: LayerSums, sums: LayerSums, losses: LayerSums) -> LayerSums:
    """The routing sums and balance losses of earlier micro-batches, and of one more."""
    own = {layer: {**values, **losses.get(layer, {})} for layer, values in sums.items()}
    return add_layer_sums([earlier, own] if earlier else [own])


def routing_metrics(layers: LayerSums) -> dict[str, Any]:
    """Means over layers under `moe/...`, and each layer's values under `moe/layers`, of statistics on the host."""
    if not layers:
        return {}
    rows = [_layer_metrics(layer, sums) for layer, sums in layers.items()]
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
