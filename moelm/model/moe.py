"""The sparse layer: route, send tokens to their experts, compute, bring the weighted sum back. Dropless by default.

Shapes: B batch, T positions, N = B*T tokens, D model width, S assignments.
"""

from torch import Tensor, nn

from moelm.config import (
    ExpertChoiceRouterConfig,
    HashRouterConfig,
    HierarchicalRouterConfig,
    ModelConfig,
    MoEFFNConfig,
    NoisyTopKRouterConfig,
    RandomRouterConfig,
    SigmoidRouterConfig,
    TopKRouterConfig,
)
from moelm.model.dispatch import combine, drop_over_capacity, plan_dispatch, send
from moelm.model.experts import Experts
from moelm.model.ffn import DenseFFN
from moelm.model.noisy_router import HierarchicalRouter, NoisyTopKRouter
from moelm.model.router import BlindRouter, ExpertChoiceRouter, Routing, SigmoidRouter, TokenContext, TopKRouter


def build_router(dim: int, ffn: MoEFFNConfig, layer: int) -> nn.Module:
    """The router of one layer, as its config asks."""
    size = (dim, ffn.num_experts, ffn.top_k)
    match ffn.router:
        case TopKRouterConfig(normalize=normalize):
            return TopKRouter(*size, normalize)
        case NoisyTopKRouterConfig():
            return NoisyTopKRouter(*size, layer)
        case SigmoidRouterConfig() as config:
            return SigmoidRouter(*size, config)
        case HierarchicalRouterConfig() as config:
            return HierarchicalRouter(*size, layer, config)
        case ExpertChoiceRouterConfig():
            return ExpertChoiceRouter(*size)
        case HashRouterConfig() | RandomRouterConfig() as config:
            return BlindRouter(ffn.num_experts, ffn.top_k, layer, by_token=config.kind == "hash")


class MoE(nn.Module):
    """A sparsely-gated mixture of gated experts (Shazeer et al. 2017, eq. 1; Mixtral 2024, section 2.1)."""

    def __init__(self, config: ModelConfig, ffn: MoEFFNConfig, layer: int) -> None:
        super().__init__()
        self.capacity_factor = ffn.capacity_factor
        self.router = build_router(config.dim, ffn, layer)
        self.experts = Experts(ffn.num_experts, config.dim, ffn.hidden_dim, ffn.depth, config.activation)
        width = ffn.shared_experts * ffn.hidden_dim
        self.shared = DenseFFN(config.dim, width, ffn.depth, config.activation) if width else None

    def forward(self, x_BTD: Tensor, context: TokenContext) -> tuple[Tensor, Routing]:
        """The weighted sum of the chosen experts' outputs, plus the shared experts', and the routing that made it."""
        x_ND = x_BTD.flatten(0, 1)
        routing: Routing = self.router(x_ND, context)
        if self.capacity_factor is not None and self.training:
            routing = drop_over_capacity(routing, self.capacity_factor, context.valid_N)
        plan = plan_dispatch(routing)
        gates_S = routing.gates_NK.flatten().index_select(0, plan.order_S)
        y_BTD = combine(self.experts(send(x_ND, plan), gates_S, plan.ends_E), plan).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, context)[0]
        return y_BTD, routing
