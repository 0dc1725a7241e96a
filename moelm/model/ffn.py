"""The gated feed-forward block, dense or as the body of one expert.

Shapes: B batch, T positions, N tokens, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.model.router import TokenContext


def gated_ffn(x_ND: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor, activation: str) -> Tensor:
    """w2 (act(w1 x) * w3 x), as Mixtral names them: SwiGLU or, with `gelu` in its tanh form, GeGLU (Shazeer 2020)."""
    gate_NF = F.linear(x_ND, w1_FD)
    gate_NF = F.silu(gate_NF) if activation == "silu" else F.gelu(gate_NF, approximate="tanh")
    return F.linear(gate_NF * F.linear(x_ND, w3_FD), w2_DF)


class DenseFFN(nn.Module):
    """One gated block that every token passes."""

    def __init__(self, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(hidden_dim, dim))

    def forward(self, x_BTD: Tensor, context: TokenContext) -> tuple[Tensor, None]:
        """The block's output; a dense block has no routing to report, and asks nothing about its tokens."""
        y_ND = gated_ffn(x_BTD.flatten(0, 1), self.w1, self.w2, self.w3, self.activation)
        return y_ND.view_as(x_BTD), None
