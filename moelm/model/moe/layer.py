"""The sparse feed-forward layer: route, dispatch, experts, combine.

Shapes: B batch, T positions, N = B*T tokens, D model width, S rows.
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
from moelm.model.backend import compute_dtype
from moelm.model.feed_forward import FeedForward
from moelm.model.moe.dispatcher import LocalDispatcher, TokenDispatcher, drop_over_capacity
from moelm.model.moe.experts import Experts
from moelm.model.moe.noisy_router import HierarchicalRouter, NoisyTopKRouter
from moelm.model.moe.router import (
    ExpertChoiceRouter,
    FixedRouter,
    Router,
    Routing,
    SigmoidRouter,
    TokenContext,
    TopKRouter,
)


def build_router(dim: int, ffn: MoEFFNConfig, layer: int) -> Router:
    """The router of one layer, as configured."""
    args = (dim, ffn.num_experts, ffn.top_k)
    match ffn.router:
        case TopKRouterConfig(normalize=normalize):
            return TopKRouter(*args, normalize, bias=ffn.balance.bias > 0)
        case NoisyTopKRouterConfig():
            return NoisyTopKRouter(*args, layer)
        case SigmoidRouterConfig() as config:
            return SigmoidRouter(*args, config)
        case HierarchicalRouterConfig() as config:
            return HierarchicalRouter(*args, layer, config)
        case ExpertChoiceRouterConfig():
            return ExpertChoiceRouter(*args)
        case HashRouterConfig() | RandomRouterConfig() as config:
            return FixedRouter(ffn.num_experts, ffn.top_k, layer, by_token=config.kind == "hash")


class MoELayer(nn.Module):
    """A sparsely-gated mixture of experts (Shazeer et al. 2017, eq. 1; Mixtral 2024, section 2.1), dropless by default."""

    def __init__(self, config: ModelConfig, ffn: MoEFFNConfig, layer: int) -> None:
        super().__init__()
        self.capacity_factor = ffn.capacity_factor
        self.router = build_router(config.dim, ffn, layer)
        self.dispatcher: TokenDispatcher = LocalDispatcher()
        self.experts = Experts(ffn.num_experts, config.dim, ffn.hidden_dim, ffn.depth, config.activation)
        shared_dim = ffn.shared_experts * ffn.hidden_dim
        self.shared = FeedForward(config.dim, shared_dim, ffn.depth, config.activation) if shared_dim else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if ffn.shared_gate else None

    def forward(self, x_BTD: Tensor, context: TokenContext, routing: Routing | None = None) -> tuple[Tensor, Routing]:
        """The gated sum of the selected experts' outputs plus the shared experts' output, and the routing.

        Args:
            routing: of these tokens, instead of the router's.
        """
        x_ND = x_BTD.flatten(0, 1)
        if routing is None:
            routing = self.router(x_ND, context)
        if self.capacity_factor is not None and self.training:
            routing = drop_over_capacity(routing, self.capacity_factor, context.valid_N)
        rows = self.dispatcher.dispatch(x_ND.to(compute_dtype(x_ND)), routing)
        y_SD = self.experts(rows.x_SD, rows.gates_S, rows.ends_E)
        y_BTD = self.dispatcher.combine(y_SD, rows).view_as(x_BTD)
        if self.shared is not None:
            shared_BTD = self.shared(x_BTD, context)[0]
            if self.shared_gate is not None:
                shared_BTD = self.shared_gate(x_BTD).sigmoid() * shared_BTD
            y_BTD = y_BTD + shared_BTD
        return y_BTD, routing
