"""The training objective: next-token loss over the tokens of the whole batch, plus the weighted balance losses.

A global batch may be cut into micro-batches; with scope `global` the objective and its gradient do not depend on the cuts.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.config import BalanceConfig
from moelm.data.loader import IGNORE, Batch
from moelm.model import Routing, balance
from moelm.model.transformer import ModelOutput

Counts = dict[int, Tensor]
"""Assignments per expert, by layer."""


def token_loss(output: ModelOutput, batch: Batch, num_tokens: float) -> Tensor:
    """Cross-entropy summed over valid targets, divided by the valid tokens of the whole batch."""
    logits_NV = output.logits.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum") / num_tokens


def count_assignments(routings: dict[int, Routing], batch: Batch) -> Counts:
    """Assignments per expert of one micro-batch."""
    valid_N = batch.valid_N
    return {layer: balance.expert_counts(routing, valid_N) for layer, routing in routings.items()}


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Assignments of a batch from those of its micro-batches."""
    total: Counts = {}
    for part in parts:
        for layer, counts_E in part.items():
            total[layer] = total[layer] + counts_E if layer in total else counts_E
    return total


def balance_loss(
    output: ModelOutput, batch: Batch, counts: Counts, num_tokens: float, config: BalanceConfig
) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
    """The weighted balance losses of one micro-batch, summed over layers, and each layer's unweighted ones.

    Args:
        counts: assignments of the whole batch (scope `global`) or of this micro-batch (`micro`).
        num_tokens: valid tokens of the whole batch.
    """
    valid_N = batch.valid_N
    total = output.logits.new_zeros((), dtype=torch.float32)
    layers: dict[int, dict[str, Tensor]] = {}
    for layer, routing in output.routings.items():
        if routing.logits_NE.shape[-1] == 1:
            continue  # one expert has nothing to balance, and its router must not pull at the model
        load_E = counts[layer] / counts[layer].sum()
        losses = {
            "aux_loss": balance.aux_loss(routing, valid_N, load_E, num_tokens),
            "z_loss": balance.z_loss(routing, valid_N, num_tokens),
        }
        total = total + config.aux * losses["aux_loss"] + config.z * losses["z_loss"]
        layers[layer] = {name: loss.detach() for name, loss in losses.items()}
    return total, layers


class RoutingStatistics:
    """What the metrics say of a batch's routing, gathered micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def add(self, output: ModelOutput, batch: Batch, losses: dict[int, dict[str, Tensor]]) -> None:
        """Take in one micro-batch."""
        valid_N = batch.valid_N
        for layer, routing in output.routings.items():
            sums = {
                "load": balance.expert_counts(routing, valid_N),
                "importance": balance.importance(routing, valid_N),
                "entropy": balance.entropy(routing, valid_N),
                "tokens": valid_N.sum(),
                **losses.get(layer, {}),
            }
            known = self.layers.get(layer)
            self.layers[layer] = {key: known[key] + sums[key] for key in sums} if known else sums

    def as_metrics(self) -> dict[str, Any]:
        """Means over layers under `moe/...`, and every layer's own figures under `moe/layers`."""
        if not self.layers:
            return {}
        rows = [self._row(layer, sums) for layer, sums in self.layers.items()]
        names = [name for name in rows[0] if name not in ("layer", "load")]
        means = {f"moe/{name}": sum(row[name] for row in rows) / len(rows) for name in names}
        return means | {"moe/layers": rows}

    @staticmethod
    def _row(layer: int, sums: dict[str, Tensor]) -> dict[str, Any]:
        load_E = sums["load"] / sums["load"].sum()
        return {
            "layer": layer,
            "load": [round(share, 6) for share in load_E.tolist()],
            "load_max_over_mean": float(load_E.max() * load_E.numel()),
            "load_cv": balance.variation(load_E),
            "importance_cv": balance.variation(sums["importance"]),
            "entropy": float(sums["entropy"] / sums["tokens"]),
            "dead_experts": int((load_E == 0).sum()),
            "aux_loss": float(sums.get("aux_loss", 0.0)),
            "z_loss": float(sums.get("z_loss", 0.0)),
        }
