"""The sparse layer: route, sort tokens by expert, compute, put them back in order, weigh and sum. Dropless.

Shapes: B batch, T positions, N = B*T tokens, D model width, E experts, K experts chosen per token, S = N*K assignments.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moelm.config import MoEFFNConfig
from moelm.model.experts import Experts
from moelm.model.router import Routing, TopKRouter


class _TakeRows(torch.autograd.Function):
    """Rows of x, each taken `repeats` times, in the order of a permutation.

    Backward gathers too, along the inverse permutation, and sums the copies in a fixed order: autograd's own scatter-add
    is slow on CPUs and, on GPUs, differs from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_S: Tensor, inverse_S: Tensor, repeats: int) -> Tensor:
        ctx.save_for_backward(inverse_S)
        ctx.repeats = repeats
        return x.index_select(0, order_S // repeats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_S,) = ctx.saved_tensors
        return (
            grads[0].index_select(0, inverse_S).view(-1, ctx.repeats, *grads[0].shape[1:]).sum(dim=1),
            None,
            None,
            None,
        )


def take_rows(x: Tensor, order_S: Tensor, inverse_S: Tensor, repeats: int = 1) -> Tensor:
    """`x[order_S // repeats]` with a deterministic gradient; `inverse_S` undoes the permutation `order_S`."""
    taken: Tensor = _TakeRows.apply(x, order_S, inverse_S, repeats)  # type: ignore[no-untyped-call]
    return taken


class MoE(nn.Module):
    """A sparsely-gated mixture of SwiGLU experts (Shazeer et al. 2017, eq. 1; Mixtral 2024, section 2.1)."""

    def __init__(self, dim: int, config: MoEFFNConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.num_experts = config.num_experts
        self.router = TopKRouter(dim, config.num_experts, config.top_k)
        self.experts = Experts(config.num_experts, dim, config.hidden_dim)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """The weighted sum of the chosen experts' outputs, and the routing that made it."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND)
        chosen_S = routing.experts_NK.flatten()
        order_S = chosen_S.argsort(stable=True)
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        counts = torch.bincount(chosen_S, minlength=self.num_experts).tolist()
        y_SD = self.experts(take_rows(x_ND, order_S, inverse_S, self.top_k), counts)
        y_NKD = take_rows(y_SD, inverse_S, order_S).view(-1, self.top_k, x_ND.shape[-1])
        y_ND = (y_NKD * routing.gates_NK[..., None].to(y_NKD.dtype)).sum(dim=1)
        return y_ND.view_as(x_BTD), routing
