"""The training objective: next-token loss over the global batch, plus weighted balance losses.

A global batch may be divided into micro-batches and over processes; with scope `global`, the objective and its gradient do
not depend on the division.
"""

from typing import NamedTuple

from torch import Tensor

from moelm.config import BalanceConfig
from moelm.data.loader import Batch
from moelm.model import ModelOutput, Routing
from moelm.model.moe import balance
from moelm.model.moe.balance import LayerSums, Sums

LOSSES = {
    "aux": balance.aux_loss,
    "z": balance.z_loss,
    "importance": balance.importance_loss,
    "load": balance.load_loss,
}
"""Balance losses by the name of their weight in the config."""


class MicroBatchLoss(NamedTuple):
    """A micro-batch's share of the objective; the shares' gradients and values add up to the batch's."""

    total: Tensor
    """The differentiated loss."""
    tokens: Tensor
    """The next-token loss in it, detached."""
    sums: LayerSums
    balance: LayerSums
    """The balance losses in use by layer, unweighted and detached."""


def micro_batch_loss(
    output: ModelOutput, batch: Batch, batch_sums: LayerSums | None, num_tokens: Tensor, config: BalanceConfig | None
) -> MicroBatchLoss:
    """The objective on one micro-batch.

    Args:
        batch_sums, num_tokens: see `balance_loss`.
        config: None for a dense model.
    """
    assert output.losses is not None
    tokens = output.losses.total / num_tokens
    if config is None or not output.routings:
        return MicroBatchLoss(tokens, tokens.detach(), {}, {})
    sums = layer_sums(output.routings, batch)
    extra, layers = balance_loss(output.routings, sums, batch_sums, batch, num_tokens, config)
    return MicroBatchLoss(tokens + extra, tokens.detach(), sums, layers)


def layer_sums(routings: dict[int, Routing], batch: Batch) -> LayerSums:
    """The routing sums of one micro-batch."""
    valid_N = batch.valid_N
    return {layer: balance.routing_sums(routing, valid_N) for layer, routing in routings.items()}


def balance_loss(
    routings: dict[int, Routing],
    own_sums: LayerSums,
    batch_sums: LayerSums | None,
    batch: Batch,
    num_tokens: Tensor,
    config: BalanceConfig,
) -> tuple[Tensor | float, LayerSums]:
    """The weighted balance losses of one micro-batch, summed over layers, and each layer's unweighted losses.

    Args:
        own_sums: sums of the micro-batch.
        batch_sums: sums of the global batch, if it is divided and the config `needs_whole_batch`. The losses are then those
            of the global batch, with the gradient of this micro-batch.
        num_tokens: valid tokens of the global batch.

    Returns:
        A loss whose gradients add up to the batch's, and by layer the losses in use, which add up to the batch's.
    """
    total: Tensor | float = 0.0
    layers: LayerSums = {}
    for layer, own in own_sums.items():
        routing = routings[layer]
        if routing.num_experts == 1:
            continue  # one expert needs no balancing, and its router must not affect the model
        share = own["tokens"] / num_tokens
        sums = own
        if batch_sums is not None:
            sums = {name: batch_sums[layer][name] + (own[name] - own[name].detach()) for name in own}
        losses: Sums = {}
        for name, loss_of in LOSSES.items():
            if not (weight := getattr(config, name)):
                continue
            by_sequence = name == "aux" and config.scope == "sequence"
            loss = balance.sequence_aux_loss(routing, batch.valid_BT) if by_sequence else loss_of(sums)
            total = total + weight * (loss * share if batch_sums is None else loss)
            losses[f"{name}_loss"] = (loss * share).detach()
        layers[layer] = losses
    return total, layers
