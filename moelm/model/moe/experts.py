"""The routed experts of one layer: stacked weights and their computation on rows sorted by expert.

Shapes: S rows sorted by expert, D model width, F hidden width, E experts.
"""

import torch
from torch import Tensor, nn

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.errors import MoelmError
from moelm.model.dtensor import local
from moelm.model.swiglu import Weights, grouped_swiglu, split_depth

MAX_GROUPS = 1024
"""`F.grouped_mm` takes fewer groups."""


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


def check_grouped_kernel(config: ModelConfig, ep: int) -> None:
    """Refuse experts whose shape `F.grouped_mm` does not take: rows of weights are multiples of 16 bytes.

    Args:
        config: of a model that is computed in bfloat16 on GPUs.
        ep: processes that the experts are sharded over.

    Raises:
        MoelmError: a width is no multiple of 8, or there are too many experts.
    """
    ffn = config.ffn
    if not isinstance(ffn, MoEFFNConfig):
        return
    for name, width in (("model.dim", config.dim), ("model.ffn.hidden_dim / depth", ffn.hidden_dim // ffn.depth)):
        if width % 8:
            raise MoelmError(
                f"{name} is {width}; experts on GPUs in bf16 need a multiple of 8. train.precision=fp32 takes any width."
            )
    if ffn.num_experts // ep >= MAX_GROUPS:
        raise MoelmError(
            f"model.ffn.num_experts is {ffn.num_experts}, {ffn.num_experts // ep:,} on each process; on GPUs in bf16 "
            f"fewer than {MAX_GROUPS:,} are expected on each. A larger parallel.ep or train.precision=fp32 would do."
        )


def expert_stacks(model: nn.Module) -> list[Experts]:
    """The experts of each sparse layer, in order."""
    return [module for module in model.modules() if isinstance(module, Experts)]
