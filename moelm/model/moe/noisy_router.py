"""The noisy top-k routers of Shazeer et al. 2017, flat (section 2.1) and hierarchical (appendix B), with the smooth load.

Shapes: N tokens, D model width, E experts, K choices per token, A groups, J = E/A experts per group, P selected groups.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import HierarchicalRouterConfig
from moelm.model import rng
from moelm.model.moe.router import UNAVAILABLE, Router, Routing, SmoothLoad, TokenContext, router_logits


def noisy_logits(clean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    """H of eq. 4: clean logits plus, in training, standard normal noise times the learned standard deviation."""
    return clean if noise is None else clean + noise * std


def selection_probability(clean: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    """P(x, i) of eqs 8-9: the probability that i is among the k largest if only its own noise were resampled.

    Args:
        clean, noisy, std: logits without noise, with noise, and the noise's standard deviation, `(..., E)`.
        k: choices; with k = E everything is selected.

    Returns:
        Probabilities, `(..., E)`.
    """
    if k >= clean.shape[-1]:
        return torch.ones_like(clean)
    top = noisy.topk(k + 1, dim=-1).values
    last_in, first_out = top[..., k - 1 : k], top[..., k : k + 1]
    # The k-th largest of the others: a selected expert would have to fall below the first one not selected.
    kth_excluding = torch.where(noisy >= last_in, first_out, last_in)
    # A softplus is positive, but in float32 it can be too close to zero to divide by.
    standardized = (clean - kth_excluding) / std.clamp_min(1e-6)
    return 0.5 * (1 + torch.erf(standardized / math.sqrt(2)))


class NoisyTopKRouter(Router):
    """G(x) = Softmax(KeepTopK(H(x), k)), H_i = (x W_g)_i + N(0,1) Softplus((x W_noise)_i) (eqs 3-5).

    Both matrices are initialized to zero, so that the first choices are uniformly random. Evaluation has no noise.
    """

    zero_init = needs_rng = True

    def __init__(self, dim: int, num_experts: int, top_k: int, layer: int) -> None:
        super().__init__(num_experts, top_k, layer=layer)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))

    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Select the k largest noisy logits."""
        clean_NE = router_logits(x_ND, self.weight)
        std_NE = F.softplus(router_logits(x_ND, self.noise_weight))
        noise_NE = rng.normal(context.rng_keys_N, self.num_experts, self.stream) if self.training else None
        noisy_NE = context.available(noisy_logits(clean_NE, std_NE, noise_NE))
        top_NK, experts_NK = noisy_NE.topk(self.top_k, dim=-1)
        smooth = None
        if self.training:
            probability_NE = selection_probability(clean_NE, noisy_NE, std_NE, self.top_k)
            one_N1 = probability_NE.new_ones(len(x_ND), 1)
            smooth = SmoothLoad(probability_NE, one_N1, one_N1.bool())
        return Routing(top_NK.softmax(dim=-1), experts_NK, noisy_NE.softmax(dim=-1), noisy_NE, smooth)


class HierarchicalRouter(Router):
    """A noisy gate over groups and one within each group: y = sum_i sum_j G_primary,i G_i,j E_i,j (eq. 12).

    `group_k` groups are selected for a token, and `top_k / group_k` experts in each of them.
    """

    zero_init = needs_rng = True

    def __init__(self, dim: int, num_experts: int, top_k: int, layer: int, config: HierarchicalRouterConfig) -> None:
        super().__init__(num_experts, top_k, layer=layer)
        self.groups, self.group_k = config.groups, config.group_k
        self.inner_k = top_k // config.group_k
        self.group_weight = nn.Parameter(torch.empty(config.groups, dim))
        self.group_noise_weight = nn.Parameter(torch.empty(config.groups, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))

    def route(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Select groups, then experts in them; gates are products."""
        clean_NA = router_logits(x_ND, self.group_weight)
        std_NA = F.softplus(router_logits(x_ND, self.group_noise_weight))
        clean_NAJ = router_logits(x_ND, self.weight).view(len(x_ND), self.groups, self.num_experts // self.groups)
        std_NAJ = F.softplus(router_logits(x_ND, self.noise_weight)).view_as(clean_NAJ)
        noise_NA = noise_NAJ = None
        if self.training:
            noise = rng.normal(context.rng_keys_N, self.groups + self.num_experts, self.stream)
            noise_NA, noise_NAJ = noise[:, : self.groups], noise[:, self.groups :].view_as(clean_NAJ)
        noisy_NA = noisy_logits(clean_NA, std_NA, noise_NA)
        noisy_NAJ = noisy_logits(clean_NAJ, std_NAJ, noise_NAJ)
        if context.available_NE is not None:
            available_NAJ = context.available_NE.view_as(noisy_NAJ)
            noisy_NAJ = noisy_NAJ.masked_fill(~available_NAJ, UNAVAILABLE)
            noisy_NA = noisy_NA.masked_fill(~available_NAJ.any(dim=-1), UNAVAILABLE)

        top_NP, groups_NP = noisy_NA.topk(self.group_k, dim=-1)
        inner_NPJ = noisy_NAJ.gather(1, groups_NP[..., None].expand(-1, -1, noisy_NAJ.shape[-1]))
        inner_top, inner_experts = inner_NPJ.topk(self.inner_k, dim=-1)
        gates_NK = (top_NP.softmax(dim=-1)[..., None] * inner_top.softmax(dim=-1)).flatten(1)
        experts_NK = (groups_NP[..., None] * noisy_NAJ.shape[-1] + inner_experts).flatten(1)
        probs_NE = (noisy_NA.softmax(dim=-1)[..., None] * noisy_NAJ.softmax(dim=-1)).flatten(1)
        smooth = None
        if self.training:
            smooth = SmoothLoad(
                selection_probability(clean_NAJ, noisy_NAJ, std_NAJ, self.inner_k).flatten(1),
                selection_probability(clean_NA, noisy_NA, std_NA, self.group_k),
                torch.zeros_like(clean_NA, dtype=torch.bool).scatter(1, groups_NP, True),
            )
        return Routing(gates_NK, experts_NK, probs_NE, smooth=smooth)
