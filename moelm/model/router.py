"""Routers: which experts a token visits and with which weights. Balancing them is `moelm.model.balance`'s matter.

The noisy gates of 2017 live in `moelm.model.noisy_router`.

Shapes: B batch, T positions, N = B*T tokens, D model width, E experts, K choices per token, A groups, C tokens per expert.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import SigmoidRouterConfig
from moelm.model import noise


class TokenContext(NamedTuple):
    """What a router may know of its tokens beside their vectors."""

    tokens_N: Tensor
    """Token ids."""
    keys_N: Tensor
    """What names a token for `moelm.model.noise`; empty where no router draws."""
    valid_N: Tensor | None = None
    """False for padding, which takes no place in an expert; None where there is none."""

    def at_visit(self, visit: int) -> "TokenContext":
        """The same tokens in layers that they meet again: what is drawn for them is drawn anew."""
        if not visit:
            return self
        offset = visit << 32  # past all token ids
        return self._replace(tokens_N=self.tokens_N + offset, keys_N=self.keys_N + offset)


class SmoothLoad(NamedTuple):
    """Chances of being chosen if a token's noise were drawn anew (Shazeer et al. 2017, eqs 8-9 and 14).

    A flat router is one group that every token visits.
    """

    experts_NE: Tensor
    """P(x, j) of an expert inside its group."""
    groups_NA: Tensor
    """P(x, i) of each group."""
    visited_NA: Tensor
    """Whether the token visits the group."""


class Routing(NamedTuple):
    """What one MoE layer decided, in float32; the balance losses and the statistics are functions of this."""

    gates_NK: Tensor
    """Weights of the chosen experts' outputs."""
    experts_NK: Tensor
    """Numbers of the chosen experts, best first."""
    probs_NE: Tensor
    """The router's distribution over all experts; each row sums to 1."""
    logits_NE: Tensor | None = None
    """Scores before any softmax; None where there is no single one."""
    smooth: SmoothLoad | None = None
    """Of noisy routers, in training."""
    chosen_NK: Tensor | None = None
    """False where a column holds no choice, because experts choose; None where all do."""
    dropped_NK: Tensor | None = None
    """True where the expert was full; None where capacity is unlimited."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs_NE.shape[-1]


class Router(nn.Module, ABC):
    """Base of the routers with one matrix of logits."""

    zero_init = False
    """Whether the weights start at zero rather than at random."""
    draws = False
    """Whether it needs random numbers."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Choose in float32 whatever the model computes in: a rounded logit would send tokens elsewhere."""
        device = x_ND.device.type
        plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with plain:
            return self.route(F.linear(x_ND.float(), self.weight.float()), context)

    @abstractmethod
    def route(self, logits_NE: Tensor, context: TokenContext) -> Routing:
        """From logits to a choice."""


class TopKRouter(Router):
    """The k largest logits (Mixtral 2024, section 2.1).

    Args:
        normalize: softmax over the chosen, the same as softmax, top-k, renormalise; else the full softmax's values.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, normalize: bool = True) -> None:
        super().__init__(dim, num_experts, top_k)
        self.normalize = normalize

    def route(self, logits_NE: Tensor, context: TokenContext) -> Routing:
        """Softmax over the chosen, or their part of the softmax over all."""
        probs_NE = logits_NE.softmax(dim=-1)
        top_NK, experts_NK = logits_NE.topk(self.top_k, dim=-1)
        gates_NK = top_NK.softmax(dim=-1) if self.normalize else probs_NE.gather(-1, experts_NK)
        return Routing(gates_NK, experts_NK, probs_NE, logits_NE)


class SigmoidRouter(Router):
    """Sigmoid scores with a bias that counts in the choice alone (DeepSeek-V3 2024, eqs 13-16; Wang et al. 2024).

    The bias is no parameter: `moelm.model.balance.bias_step` moves it after each optimizer step.
    """

    bias: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, config: SigmoidRouterConfig) -> None:
        super().__init__(dim, num_experts, top_k)
        self.normalize, self.scale = config.normalize, config.scale
        self.register_buffer("bias", torch.zeros(num_experts))

    def route(self, logits_NE: Tensor, context: TokenContext) -> Routing:
        """Choose by score plus bias, weigh by score alone."""
        scores_NE = logits_NE.sigmoid()
        experts_NK = (scores_NE + self.bias).topk(self.top_k, dim=-1).indices
        gates_NK = scores_NE.gather(-1, experts_NK)
        if self.normalize:
            gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True)
        probs_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
        return Routing(self.scale * gates_NK, experts_NK, probs_NE, logits_NE)


class ExpertChoiceRouter(Router):
    """Each expert takes its C = N k / E best tokens of the forward pass (Zhou et al. 2022, section 3.2).

    Whether a token is taken depends on the tokens after it: in a causal model this leaks the future.
    """

    def route(self, logits_NE: Tensor, context: TokenContext) -> Routing:
        """Gates are the softmax over experts of the tokens taken; a token may be taken by any number of experts."""
        probs_NE = logits_NE.softmax(dim=-1)
        wanted_NE = probs_NE
        tokens = len(probs_NE)
        if context.valid_N is not None:
            tokens = int(context.valid_N.sum())
            wanted_NE = probs_NE.masked_fill(~context.valid_N[:, None], -1.0)
        capacity = min(tokens, max(1, round(tokens * self.top_k / self.num_experts)))
        taken_CE = wanted_NE.topk(capacity, dim=0).indices
        chosen_NE = torch.zeros_like(probs_NE, dtype=torch.bool).scatter(0, taken_CE, True)
        experts_NE = torch.arange(self.num_experts, device=probs_NE.device).expand_as(probs_NE)
        return Routing(probs_NE, experts_NE, probs_NE, logits_NE, chosen_NK=chosen_NE)


class BlindRouter(nn.Module):
    """Experts that do not depend on the token's vector, each with weight 1/k: the controls of a routing study.

    Args:
        layer: number of the layer; each has its own table.
        by_token: a fixed random table from token ids to experts (Roller et al. 2021, "random hash"); else experts are
            drawn anew at every step, and in evaluation by position.
    """

    zero_init = False

    def __init__(self, num_experts: int, top_k: int, layer: int, by_token: bool) -> None:
        super().__init__()
        self.draws = not by_token
        self.num_experts, self.top_k, self.layer, self.by_token = num_experts, top_k, layer, by_token

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """k different experts, all sets equally likely."""
        keys_N = context.tokens_N if self.by_token else context.keys_N
        experts_NK = noise.uniform(keys_N, self.num_experts, self.layer).topk(self.top_k, dim=-1).indices
        gates_NK = torch.full(experts_NK.shape, 1 / self.top_k, device=x_ND.device)
        probs_NE = torch.full((len(x_ND), self.num_experts), 1 / self.num_experts, device=x_ND.device)
        return Routing(gates_NK, experts_NK, probs_NE)
