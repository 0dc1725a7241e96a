"""The experts' computation on tokens already sorted by expert: small functions behind one signature.

Shapes: S assignments (token, expert) sorted by expert, D model width, F hidden width, E experts.
"""

import torch
from torch import Tensor, nn

from moelm.model.ffn import gated_ffn


def experts_loop(
    x_SD: Tensor, counts: list[int], w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, activation: str
) -> Tensor:
    """One expert after another, each on its slice: the reference, and the fastest on CPUs.

    The weights are unbound once: indexing them inside the loop would make backward write E full-size gradients.
    """
    slices = torch.split(x_SD, counts)
    weights = zip(w1_EFD.unbind(), w2_EDF.unbind(), w3_EFD.unbind(), strict=True)
    return torch.cat([gated_ffn(x, w1, w2, w3, activation) for x, (w1, w2, w3) in zip(slices, weights, strict=True)])


class Experts(nn.Module):
    """The weights of all experts of a layer, stacked."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x_SD: Tensor, counts: list[int]) -> Tensor:
        """Send each slice of `counts[e]` rows through expert e."""
        return experts_loop(x_SD, counts, self.w1, self.w2, self.w3, self.activation)
