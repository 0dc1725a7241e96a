"""The weights of a layer's experts.

Shapes: S assignments (token, expert) sorted by expert, D model width, F hidden width, E experts.
"""

import torch
from torch import Tensor, nn

from moelm.model.gated import gated_experts


class Experts(nn.Module):
    """The weights of all experts of a layer, stacked."""

    recompute = False
    """Whether hidden activations are made again in the backward pass rather than kept."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x_SD: Tensor, gates_S: Tensor, ends_E: Tensor) -> Tensor:
        """Send the rows up to `ends_E[e]` through expert e, and weigh what comes out."""
        return gated_experts(x_SD, ends_E, (self.w1, self.w2, self.w3), self.activation, gates_S, self.recompute)
