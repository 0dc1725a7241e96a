"""The role of each parameter in a model."""

from typing import Literal

from torch import Tensor, nn

from moelm.model.attention import Attention
from moelm.model.feed_forward import FeedForward
from moelm.model.moe.experts import Experts
from moelm.model.moe.router import Router
from moelm.model.norm import RMSNorm
from moelm.model.transformer import Transformer

Role = Literal["embedding", "head", "attention", "ffn", "experts", "router", "norm"]
HIDDEN_ROLES: tuple[Role, ...] = ("attention", "ffn", "experts")
"""Roles whose parameters are matrices from one hidden vector to another, or stacks of them, one for each expert."""


def parameter_roles(model: Transformer) -> dict[nn.Parameter, Role]:
    """The role of every parameter, in the order of the model. Biases have that of norms, and the gate of shared experts has
    that of routers.

    The expert of a mixture of one has the role of the dense block, which it is equal to.
    """
    return {
        parameter: "norm" if parameter.dim() == 1 else _role(name, module)
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }


def _role(name: str, module: nn.Module) -> Role:
    match module:
        case nn.Embedding():
            return "embedding"
        case RMSNorm():
            return "norm"
        case Router():
            return "router"
        case Experts():
            return "experts" if len(module.w1) > 1 else "ffn"
        case FeedForward():
            return "ffn"
    if name.endswith("shared_gate"):
        return "router"
    return "head" if name == "head" else "attention"


def head_counts(model: Transformer) -> dict[Tensor, int]:
    """The number of heads whose rows each query, key and value projection consists of."""
    return {
        projection.weight: heads
        for module in model.modules()
        if isinstance(module, Attention)
        for projection, heads in ((module.wq, module.heads), (module.wk, module.kv_heads), (module.wv, module.kv_heads))
    }
