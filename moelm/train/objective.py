"""The training objective: next-token loss over the tokens of the whole batch, plus the weighted balance losses.

A global batch may be cut into micro-batches and over processes; with scope `global` the objective and its gradient do not
depend on the cuts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.config import BalanceConfig
from moelm.data.loader import Batch
from moelm.model import ModelOutput, Routing, balance
from moelm.model.balance import Sums

LayerSums = dict[int, Sums]
"""What `moelm.model.balance` sums up, by layer."""

LOSSES = {
    "aux": balance.aux_loss,
    "z": balance.z_loss,
    "importance": balance.importance_loss,
    "load": balance.load_loss,
}


def layer_sums(routings: dict[int, Routing], batch: Batch) -> LayerSums:
    """The sums of one micro-batch."""
    valid_N = batch.valid_N
    return {layer: balance.routing_sums(routing, valid_N) for layer, routing in routings.items()}


def add_layer_sums(parts: Iterable[LayerSums]) -> LayerSums:
    """The sums of a batch from those of its micro-batches, without gradients."""
    known = list(parts)
    return {layer: balance.add_sums(part[layer] for part in known) for layer in (known[0] if known else ())}


def balance_loss(
    routings: dict[int, Routing],
    own: LayerSums,
    whole: LayerSums | None,
    batch: Batch,
    num_tokens: Tensor,
    config: BalanceConfig,
) -> tuple[Tensor | float, dict[int, Sums]]:
    """The weighted balance losses of one micro-batch, summed over layers, and each layer's unweighted ones.

    Args:
        own: the micro-batch's sums.
        whole: the sums of the whole batch, when it is cut up and it `needs_whole_batch`; the losses are then those of the
            batch, and only their gradient is this micro-batch's.
        num_tokens: valid tokens of the whole batch.

    Returns:
        A loss whose gradients add up to the batch's, and by layer the losses in use, which add up to the batch's.
    """
    total: Tensor | float = 0.0
    layers: dict[int, Sums] = {}
    for layer, mine in own.items():
        routing = routings[layer]
        if routing.num_experts == 1:
            continue  # one expert has nothing to balance, and its router must not pull at the model
        share = mine["tokens"] / num_tokens
        sums = mine if whole is None else {name: whole[layer][name] + (mine[name] - mine[name].detach()) for name in mine}
        layers[layer] = {}
        for name, loss_of in LOSSES.items():
            if not (weight := getattr(config, name)):
                continue
            by_sequence = name == "aux" and config.scope == "sequence"
            loss = balance.sequence_aux_loss(routing, batch.valid_BT) if by_sequence else loss_of(sums)
            total = total + weight * (loss * share if whole is None else loss)
            layers[layer][f"{name}_loss"] = (loss * share).detach()
    return total, layers


class PartLoss(NamedTuple):
    """A micro-batch's part of the objective; the parts' gradients and figures add up to the batch's."""

    total: Tensor
    """What is differentiated."""
    tokens: Tensor
    """The next-token loss in it."""
    sums: LayerSums
    balance: LayerSums
    """By layer, the balance losses in use, unweighted."""


def part_loss(
    output: ModelOutput, batch: Batch, whole: LayerSums | None, num_tokens: Tensor, config: BalanceConfig | None
) -> PartLoss:
    """The objective on one micro-batch; `whole` and `num_tokens` are those of `balance_loss`."""
    assert output.losses is not None
    tokens = output.losses.total / num_tokens
    if config is None or not output.routings:
        return PartLoss(tokens, tokens.detach(), {}, {})
    sums = layer_sums(output.routings, batch)
    extra, layers = balance_loss(output.routings, sums, whole, batch, num_tokens, config)
    return PartLoss(tokens + extra, tokens.detach(), sums, layers)


class RoutingStatistics:
    """What the metrics say of a batch's routing, gathered micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.layers: LayerSums = {}

    def add(self, sums: LayerSums, losses: LayerSums) -> None:
        """Take in one micro-batch."""
        for layer, own in sums.items():
            known = [self.layers[layer]] if layer in self.layers else []
            self.layers[layer] = balance.add_sums([*known, {**own, **losses.get(layer, {})}])

    def as_metrics(self) -> dict[str, Any]:
        """Means over layers under `moe/...`, and every layer's own figures under `moe/layers`."""
        if not self.layers:
            return {}
        rows = [self._row(layer, sums) for layer, sums in all_at_once(self.layers, _to_host).items()]
        names = [name for name in rows[0] if name not in ("layer", "load")]
        means = {f"moe/{name}": sum(row[name] for row in rows) / len(rows) for name in names}
        return means | {"moe/layers": rows}

    @staticmethod
    def _row(layer: int, sums: Sums) -> dict[str, Any]:
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
        # Losses that train nothing are still told, those of the whole batch.
        row["aux_loss"] = float(sums["aux_loss"] if "aux_loss" in sums else balance.aux_loss(sums))
        row["z_loss"] = float(balance.z_loss(sums)) if "z" in sums else 0.0
        if "load" in sums:
            row["smooth_load_cv"] = float(balance.load_loss(sums).sqrt())
        if "dropped" in sums:
            row["dropped"] = float(sums["dropped"] / sums["counts"].sum())
        return row


def all_at_once(layers: LayerSums, function: Callable[[list[Tensor]], list[Tensor]]) -> LayerSums:
    """The same sums after one call on all of them: each message to another device or process costs its own time."""
    places = [(layer, name) for layer, sums in layers.items() for name in sums]
    changed: LayerSums = {layer: {} for layer in layers}
    for (layer, name), value in zip(places, function([layers[layer][name] for layer, name in places]), strict=True):
        changed[layer][name] = value
    return changed


def _to_host(values: list[Tensor]) -> list[Tensor]:
    packed = torch.cat([value.flatten().double() for value in values]).cpu()
    parts = torch.split(packed, [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
