"""The routed experts of one layer: stacked weights and their computation on rows sorted by expert.

Shapes: S rows sorted by expert, D model width, F hidden width, E experts.
"""

import torch
from torch import Tensor, nn

from moelm.model.dtensor import local
from moelm.model.swiglu import Weights, grouped_swiglu, split_depth


class Experts(nn.Module):
    """The experts of one layer. Under expert parallelism, those of this process."""

    recompute = False
    """Whether hidden activations are recomputed in the backward pass instead of stored."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, depth: int, activation: str) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x_SD: Tensor, gates_S: Tensor, ends_E: Tensor) -> Tensor:
        """Apply expert e to the rows up to `ends_E[e]`, and multiply each output by its gate."""
        w1, w2, w3 = (local(w) for w in (self.w1, self.w2, self.w3))
        if self.depth == 1:
            return grouped_swiglu(x_SD, ends_E, (w1, w2, w3), self.activation, gates_S, self.recompute)

        def hidden_layer(x_SD: Tensor, weights: Weights) -> Tensor:
            return grouped_swiglu(x_SD, ends_E, weights, self.activation, None, self.recompute)

        y_SD = split_depth(x_SD, (w1, w2, w3), self.depth, hidden_layer)
        return y_SD * gates_S[:, None].to(y_SD.dtype)


def expert_stacks(model: nn.Module) -> list[Experts]:
    """The experts of each sparse layer, in order."""
    return [module for module in model.modules() if isinstance(module, Experts)]
