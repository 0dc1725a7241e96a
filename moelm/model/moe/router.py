"""Routers: which experts process a token, and with which gates. Balance losses are in `moelm.model.moe.balance`.

The noisy routers of 2017 are in `moelm.model.moe.noisy_router`.

Shapes: N tokens, D model width, E experts, K choices per token, A groups, C tokens per expert.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import SigmoidRouterConfig
from moelm.model import rng
from moelm.model.backend import eager_on_cpu
from moelm.model.dtensor import local

MAX_SEARCHES = 8
"""Choices per token up to which successive searches for a maximum are faster than topk on a CPU."""

UNAVAILABLE = -1e9
"""Score of an expert that may not be selected; finite, so that a group without any available expert has a softmax."""

MIN_VECTORIZED = 16
"""Experts from which a softmax over the last dimension is vectorized on a CPU."""


class TokenContext(NamedTuple):
    """What a router may read about its tokens in addition to their hidden states."""

    tokens_N: Tensor
    """Token ids."""
    rng_keys_N: Tensor
    """Keys of the tokens' random numbers (`moelm.model.rng`); empty if no router needs them."""
    valid_N: Tensor | None = None
    """False for padding, which is not counted towards an expert's capacity; None if there is none."""
    available_NE: Tensor | None = None
    """False for experts that the token may not select, as if the router did not have them; None: it may select all."""

    def available(self, scores_NE: Tensor) -> Tensor:
        """Scores whose largest are selected, lowered where an expert is not available."""
        return scores_NE if self.available_NE is None else scores_NE.masked_fill(~self.available_NE, UNAVAILABLE)

    def subset(self, tokens_M: Tensor) -> "TokenContext":
        """The context of some tokens, given their indices; none of them is padding."""
        keys_N, available_NE = self.rng_keys_N, self.available_NE
        return TokenContext(
            self.tokens_N[tokens_M],
            keys_N[tokens_M] if len(keys_N) else keys_N,
            available_NE=None if available_NE is None else available_NE[tokens_M],
        )

    def at_repeat(self, repeat: int) -> "TokenContext":
        """The context for the n-th repeat of a layer, offset so that random numbers and hashes differ between repeats."""
        if not repeat:
            return self
        offset = repeat << 32  # above all token ids
        return self._replace(tokens_N=self.tokens_N + offset, rng_keys_N=self.rng_keys_N + offset)


class SmoothLoad(NamedTuple):
    """Probabilities of being selected if the noise were resampled (Shazeer et al. 2017, eqs 8-9 and 14).

    A flat router has one group, which every token selects.
    """

    experts_NE: Tensor
    """P(x, j) of an expert within its group."""
    groups_NA: Tensor
    """P(x, i) of each group."""
    visited_NA: Tensor
    """Whether the token selected the group."""


class Routing(NamedTuple):
    """The routing decision of one MoE layer, in float32. Balance losses and statistics are functions of it."""

    gates_NK: Tensor
    """Weights of the selected experts' outputs."""
    experts_NK: Tensor
    """Indices of the selected experts, best first."""
    probs_NE: Tensor
    """The router's distribution over all experts; each row sums to 1."""
    logits_NE: Tensor | None = None
    """Scores before any softmax; None for routers that have no single set of logits."""
    smooth: SmoothLoad | None = None
    """Noisy routers in training only."""
    chosen_NK: Tensor | None = None
    """False where no expert is selected (expert choice only); None if every entry is a choice."""
    dropped_NK: Tensor | None = None
    """True where the expert was at capacity, and for padding; None if capacity is unlimited."""

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.probs_NE.shape[-1]


class Router(nn.Module, ABC):
    """Base of all routers. They compute in float32, because rounded logits could select other experts."""

    zero_init = False
    """Whether the weights are initialized to zero instead of randomly."""
    needs_rng = False
    """Whether `TokenContext.rng_keys_N` is read."""
    bias: Tensor | None
    """Added to the scores for the selection only, `(E,)`; a buffer that `moelm.model.moe.balance.expert_bias_delta` updates
    after each optimizer step."""

    stream: Tensor
    """The layer's stream of random numbers, an int64 scalar that is no part of checkpoints. A Python number would be a
    constant of a compiled block, and every layer would be compiled anew."""

    def __init__(self, num_experts: int, top_k: int, bias: bool = False, layer: int = 0) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.layer = num_experts, top_k, layer
        self.register_buffer("bias", torch.empty(num_experts) if bias else None)
        self.register_buffer("stream", torch.empty((), dtype=torch.int64), persistent=False)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Set the buffers to their initial values."""
        self.stream.fill_(self.layer)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Route tokens in float32, with autocast disabled."""
        device = x_ND.device.type
        no_autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with no_autocast:
            return self.route(x_ND.float(), context)

    @abstractmethod
    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Route tokens, given their hidden states in float32."""


def router_logits(x_ND: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32; on several processes each has the whole matrix."""
    return F.linear(x_ND, local(weight).float())


@torch.no_grad()
def top_experts(scores_NE: Tensor, top_k: int) -> Tensor:
    """The indices of each token's largest scores, best first, `(N, K)`."""
    if top_k > MAX_SEARCHES or not eager_on_cpu(scores_NE):
        return scores_NE.topk(top_k, dim=-1).indices
    num_experts = scores_NE.shape[-1]
    # On a CPU amax over the first dimension is vectorized, but topk and argmax are not. The index of a maximum is the rank
    # added to a gap of zero; of equal maxima, the first has the largest rank. A score that is not a number must not give an
    # invalid index.
    scores_EN = scores_NE.t().clone(memory_format=torch.contiguous_format)
    rank_E1 = torch.arange(num_experts, 0, -1, dtype=scores_NE.dtype)[:, None]
    choices: list[Tensor] = []
    while True:
        gap_EN = scores_EN - scores_EN.amax(dim=0)
        first_N = num_experts - gap_EN.mul_(1e30).add_(rank_E1).amax(dim=0)
        choices.append(first_N.long().clamp_(0, num_experts - 1))
        if len(choices) == top_k:
            return torch.stack(choices, dim=-1)
        scores_EN.scatter_(0, choices[-1][None], float("-inf"))


def softmax_over_experts(logits_NE: Tensor) -> Tensor:
    """Softmax over the last dimension.

    On a CPU only a dimension of at least the width of a vector register is vectorized; for fewer experts the softmax is
    over the first dimension, which is vectorized over tokens.
    """
    if logits_NE.shape[-1] < MIN_VECTORIZED and eager_on_cpu(logits_NE):
        return logits_NE.t().softmax(dim=0).t()
    return logits_NE.softmax(dim=-1)


class TopKRouter(Router):
    """Softmax over the k largest logits (Mixtral 2024, section 2.1).

    Args:
        normalize: whether the softmax is over the selected experts alone; otherwise its values over all experts are used.
        bias: whether a bias is added to the probabilities for the selection (Wang et al. 2024); gates do not contain it.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, normalize: bool = True, bias: bool = False) -> None:
        super().__init__(num_experts, top_k, bias)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.normalize = normalize

    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Select the k largest logits or, with a bias, the k largest of probability plus bias."""
        logits_NE = context.available(router_logits(x_ND, self.weight))
        probs_NE = softmax_over_experts(logits_NE)
        scores_NE = logits_NE
        if self.bias is not None:
            # Different logits can have equal probabilities in float32; a bias of zero must not change the order.
            scores_NE = torch.where(self.bias.any(), context.available(probs_NE + self.bias), logits_NE)
        experts_NK = top_experts(scores_NE, self.top_k)
        selected_NK = (logits_NE if self.normalize else probs_NE).gather(-1, experts_NK)
        gates_NK = softmax_over_experts(selected_NK) if self.normalize else selected_NK
        return Routing(gates_NK, experts_NK, probs_NE, logits_NE)


class SigmoidRouter(Router):
    """Sigmoid scores with a bias that affects the selection only (DeepSeek-V3 2024, eqs 13-16; Wang et al. 2024)."""

    bias: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, config: SigmoidRouterConfig) -> None:
        super().__init__(num_experts, top_k, bias=True)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.normalize, self.scale = config.normalize, config.scale

    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Select by score plus bias; gates are scores alone."""
        logits_NE = context.available(router_logits(x_ND, self.weight))
        scores_NE = logits_NE.sigmoid()
        experts_NK = top_experts(context.available(scores_NE + self.bias), self.top_k)
        gates_NK = scores_NE.gather(-1, experts_NK)
        if self.normalize:
            gates_NK = gates_NK / gates_NK.sum(dim=-1, keepdim=True)
        probs_NE = scores_NE / scores_NE.sum(dim=-1, keepdim=True)
        return Routing(self.scale * gates_NK, experts_NK, probs_NE, logits_NE)


class ExpertChoiceRouter(Router):
    """Each expert selects its C = N k / E best tokens of the forward pass (Zhou et al. 2022, section 3.2).

    Whether a token is selected depends on later tokens: in a causal model this leaks the future.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts, top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Gates are the softmax over experts; a token may be selected by any number of experts."""
        logits_NE = router_logits(x_ND, self.weight)
        probs_NE = logits_NE.softmax(dim=-1)
        candidates_NE = probs_NE
        tokens = len(probs_NE)
        if context.valid_N is not None:
            tokens = int(context.valid_N.sum())
            candidates_NE = probs_NE.masked_fill(~context.valid_N[:, None], -1.0)
        capacity = min(tokens, max(1, round(tokens * self.top_k / self.num_experts)))
        selected_CE = candidates_NE.topk(capacity, dim=0).indices
        chosen_NE = torch.zeros_like(probs_NE, dtype=torch.bool).scatter(0, selected_CE, True)
        experts_NE = torch.arange(self.num_experts, device=probs_NE.device).expand_as(probs_NE)
        return Routing(probs_NE, experts_NE, probs_NE, logits_NE, chosen_NK=chosen_NE)


class FixedRouter(Router):
    """A router that ignores the hidden states, with gates 1/k: the control of a routing study.

    Args:
        layer: index of the layer; each has its own table.
        by_token: whether experts come from a fixed random table by token id (Roller et al. 2021, "random hash"); otherwise
            they are random at every step, and a function of the position in evaluation.
    """

    def __init__(self, num_experts: int, top_k: int, layer: int, by_token: bool) -> None:
        super().__init__(num_experts, top_k, layer=layer)
        self.by_token, self.needs_rng = by_token, not by_token

    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Select k distinct experts; all sets are equally likely."""
        rng_keys_N = context.tokens_N if self.by_token else context.rng_keys_N
        scores_NE = context.available(rng.uniform(rng_keys_N, self.num_experts, self.stream))
        experts_NK = scores_NE.topk(self.top_k, dim=-1).indices
        gates_NK = torch.full(experts_NK.shape, 1 / self.top_k, device=x_ND.device)
        probs_NE = torch.full((len(x_ND), self.num_experts), 1 / self.num_experts, device=x_ND.device)
        return Routing(gates_NK, experts_NK, probs_NE)
