"""Routers: which experts a token visits and with which weights. Balancing them is `moelm.model.balance`'s matter.

Shapes: N tokens, D model width, E experts, K experts chosen per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What one MoE layer decided, in float32; the balance losses and the statistics are functions of this."""

    logits_NE: Tensor
    gates_NK: Tensor
    """Weights of the chosen experts' outputs."""
    experts_NK: Tensor
    """Numbers of the chosen experts, best first."""

    @property
    def probs_NE(self) -> Tensor:
        """Softmax over all the experts."""
        return self.logits_NE.softmax(dim=-1)


class TopKRouter(nn.Module):
    """Softmax over the k largest logits (Mixtral 2024, section 2.1): the same as softmax, top-k, renormalise."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.top_k = top_k

    def forward(self, x_ND: Tensor) -> Routing:
        """Choose in float32 whatever the model computes in: a rounded logit would send tokens elsewhere."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
            top_NK, experts_NK = logits_NE.topk(self.top_k, dim=-1)
            return Routing(logits_NE, top_NK.softmax(dim=-1), experts_NK)
