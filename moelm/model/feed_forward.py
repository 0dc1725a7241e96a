"""The dense feed-forward block.

Shapes: B batch, T positions, N = B*T tokens, D model width, F hidden width.
"""

import torch
from torch import Tensor, nn

from moelm.model.moe.router import TokenContext
from moelm.model.swiglu import Weights, dense_swiglu, split_depth


class FeedForward(nn.Module):
    """A gated feed-forward block that processes every token."""

    recompute = False
    """Whether hidden activations are recomputed in the backward pass instead of stored."""

    def __init__(self, dim: int, hidden_dim: int, depth: int, activation: str) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        self.w1 = nn.Parameter(torch.empty(hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(hidden_dim, dim))

    def forward(self, x_BTD: Tensor, context: TokenContext) -> tuple[Tensor, None]:
        """The block's output and no routing; it has the signature of `MoELayer.forward`."""

        def hidden_layer(x_ND: Tensor, weights: Weights) -> Tensor:
            return dense_swiglu(x_ND, *weights, self.activation, self.recompute)

        y_ND = split_depth(x_BTD.flatten(0, 1), (self.w1, self.w2, self.w3), self.depth, hidden_layer)
        return y_ND.view_as(x_BTD), None
