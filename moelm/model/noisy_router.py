"""The noisy top-k gates of Shazeer et al. 2017, flat (section 2.1) and hierarchical (appendix B), with the smooth load.

Shapes: N tokens, D model width, E experts, K choices per token, A groups, J = E/A experts of a group, P groups visited.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import HierarchicalRouterConfig
from moelm.model import noise
from moelm.model.router import Routing, SmoothLoad, TokenContext


def noisy_logits(clean: Tensor, deviation: Tensor, draws: Tensor | None) -> Tensor:
    """H of eq. 4: clean logits plus, in training, normal draws times the learned deviation."""
    return clean if draws is None else clean + draws * deviation


def chance_of_choice(clean: Tensor, noisy: Tensor, deviation: Tensor, k: int) -> Tensor:
    """P(x, i) of eqs 8-9: the chance that i is among the k largest if its noise alone were drawn anew.

    Args:
        clean, noisy, deviation: logits without and with their noise and its scale, `(..., E)`.
        k: choices; with k = E everything is chosen.

    Returns:
        Chances, `(..., E)`.
    """
    if k >= clean.shape[-1]:
        return torch.ones_like(clean)
    top = noisy.topk(k + 1, dim=-1).values
    last_in, first_out = top[..., k - 1 : k], top[..., k : k + 1]
    # The k-th largest of the others: who is in now would have to fall below the first one out.
    kth_excluding = torch.where(noisy >= last_in, first_out, last_in)
    # A softplus is positive, but float32 can bring it too near to zero to divide by.
    standard = (clean - kth_excluding) / deviation.clamp_min(1e-6)
    return 0.5 * (1 + torch.erf(standard / math.sqrt(2)))


class NoisyTopKRouter(nn.Module):
    """G(x) = Softmax(KeepTopK(H(x), k)), H_i = (x W_g)_i + N(0,1) Softplus((x W_noise)_i) (eqs 3-5).

    Both matrices start at zero, so that at first the noise alone decides, evenly; evaluation has no noise.
    """

    zero_init = draws = True

    def __init__(self, dim: int, num_experts: int, top_k: int, layer: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.layer = num_experts, top_k, layer
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Choose in float32."""
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.float()
            clean_NE = F.linear(x_ND, self.weight.float())
            deviation_NE = F.softplus(F.linear(x_ND, self.noise_weight.float()))
            draws_NE = noise.normal(context.keys_N, self.num_experts, self.layer) if self.training else None
            noisy_NE = noisy_logits(clean_NE, deviation_NE, draws_NE)
            top_NK, experts_NK = noisy_NE.topk(self.top_k, dim=-1)
            smooth = None
            if self.training:
                chances_NE = chance_of_choice(clean_NE, noisy_NE, deviation_NE, self.top_k)
                one_N1 = chances_NE.new_ones(len(x_ND), 1)
                smooth = SmoothLoad(chances_NE, one_N1, one_N1.bool())
            return Routing(top_NK.softmax(dim=-1), experts_NK, noisy_NE.softmax(dim=-1), noisy_NE, smooth)


class HierarchicalRouter(nn.Module):
    """A noisy gate over groups and one inside each: y = sum_i sum_j G_primary,i G_i,j E_i,j (eq. 12).

    A token visits `group_k` groups and `top_k / group_k` experts in each of them.
    """

    zero_init = draws = True

    def __init__(self, dim: int, num_experts: int, top_k: int, layer: int, config: HierarchicalRouterConfig) -> None:
        super().__init__()
        self.num_experts, self.layer, self.groups, self.group_k = num_experts, layer, config.groups, config.group_k
        self.inner_k = top_k // config.group_k
        self.group_weight = nn.Parameter(torch.empty(config.groups, dim))
        self.group_noise_weight = nn.Parameter(torch.empty(config.groups, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_ND: Tensor, context: TokenContext) -> Routing:
        """Choose groups, then experts in them, in float32; gates are products."""
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.float()
            clean_NA = F.linear(x_ND, self.group_weight.float())
            deviation_NA = F.softplus(F.linear(x_ND, self.group_noise_weight.float()))
            clean_NAJ = F.linear(x_ND, self.weight.float()).view(len(x_ND), self.groups, -1)
            deviation_NAJ = F.softplus(F.linear(x_ND, self.noise_weight.float())).view_as(clean_NAJ)
            draws_NA = draws_NAJ = None
            if self.training:
                draws = noise.normal(context.keys_N, self.groups + self.num_experts, self.layer)
                draws_NA, draws_NAJ = draws[:, : self.groups], draws[:, self.groups :].view_as(clean_NAJ)
            noisy_NA = noisy_logits(clean_NA, deviation_NA, draws_NA)
            noisy_NAJ = noisy_logits(clean_NAJ, deviation_NAJ, draws_NAJ)

            top_NP, groups_NP = noisy_NA.topk(self.group_k, dim=-1)
            inside_NPJ = noisy_NAJ.gather(1, groups_NP[..., None].expand(-1, -1, noisy_NAJ.shape[-1]))
            inner, chosen = inside_NPJ.topk(self.inner_k, dim=-1)
            gates_NK = (top_NP.softmax(dim=-1)[..., None] * inner.softmax(dim=-1)).flatten(1)
            experts_NK = (groups_NP[..., None] * noisy_NAJ.shape[-1] + chosen).flatten(1)
            probs_NE = (noisy_NA.softmax(dim=-1)[..., None] * noisy_NAJ.softmax(dim=-1)).flatten(1)
            smooth = None
            if self.training:
                smooth = SmoothLoad(
                    chance_of_choice(clean_NAJ, noisy_NAJ, deviation_NAJ, self.inner_k).flatten(1),
                    chance_of_choice(clean_NA, noisy_NA, deviation_NA, self.group_k),
                    torch.zeros_like(clean_NA, dtype=torch.bool).scatter(1, groups_NP, True),
                )
            return Routing(gates_NK, experts_NK, probs_NE, smooth=smooth)
