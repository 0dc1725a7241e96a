"""The gated feed-forward block, dense or as the body of one expert.

Shapes: N tokens, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(x_ND: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor) -> Tensor:
    """w2 (silu(w1 x) * w3 x), Shazeer 2020; the names are those of Mixtral's weights."""
    return F.linear(F.silu(F.linear(x_ND, w1_FD)) * F.linear(x_ND, w3_FD), w2_DF)


class DenseFFN(nn.Module):
    """One SwiGLU block that every token passes."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(hidden_dim, dim))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, None]:
        """The block's output; a dense block has no routing to report."""
        return swiglu(x_BTD.flatten(0, 1), self.w1, self.w2, self.w3).view_as(x_BTD), None
