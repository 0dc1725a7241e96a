"""The dense feed-forward block.

Shapes: B batch, T positions, D model width, F hidden width.
"""

import torch
from torch import Tensor, nn

from moelm.model.gated import Weights, gated_dense, in_layers
from moelm.model.router import TokenContext


class DenseFFN(nn.Module):
    """One gated block that every token passes."""

    recompute = False
    """Whether hidden activations are made again in the backward pass rather than kept."""

    def __init__(self, dim: int, hidden_dim: int, depth: int, activation: str) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        self.w1 = nn.Parameter(torch.empty(hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(hidden_dim, dim))

    def forward(self, x_BTD: Tensor, context: TokenContext) -> tuple[Tensor, None]:
        """The block's output; a dense block has no routing to report, and asks nothing about its tokens."""

        def layer(x_ND: Tensor, weights: Weights) -> Tensor:
            return gated_dense(x_ND, *weights, self.activation, self.recompute)

        y_ND = in_layers(x_BTD.flatten(0, 1), (self.w1, self.w2, self.w3), self.depth, layer)
        return y_ND.view_as(x_BTD), None
