"""The weights of a layer's experts.

Shapes: S assignments (token, expert) sorted by expert, D model width, F hidden width, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moelm.model.gated import Weights, gated_experts, in_layers

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rows sorted by expert, their gates and where each expert's rows end, to results."""

Exchange = Callable[[Tensor, Tensor, Tensor, Compute], Tensor]
"""The same by way of experts elsewhere, each computing what it is sent."""


class Experts(nn.Module):
    """The weights of all experts of a layer, stacked."""

    recompute = False
    """Whether hidden activations are made again in the backward pass rather than kept."""
    exchange: Exchange | None = None
    """How rows reach experts on other processes; None where all are here."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, depth: int, activation: str) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x_SD: Tensor, gates_S: Tensor, ends_E: Tensor) -> Tensor:
        """Send the rows up to `ends_E[e]` through expert e, and weigh what comes out."""
        if self.exchange is not None:
            return self.exchange(x_SD, gates_S, ends_E, self._compute)
        return self._compute(x_SD, gates_S, ends_E)

    def _compute(self, x_SD: Tensor, gates_S: Tensor, ends_E: Tensor) -> Tensor:
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3))
        if self.depth == 1:
            return gated_experts(x_SD, ends_E, (w1, w2, w3), self.activation, gates_S, self.recompute)

        def layer(x_SD: Tensor, weights: Weights) -> Tensor:
            return gated_experts(x_SD, ends_E, weights, self.activation, None, self.recompute)

        y_SD = in_layers(x_SD, (w1, w2, w3), self.depth, layer)
        return y_SD * gates_S[:, None].to(y_SD.dtype)


def experts_of(model: nn.Module) -> list[Experts]:
    """The experts of all sparse layers, the first layer's first."""
    return [module for module in model.modules() if isinstance(module, Experts)]
