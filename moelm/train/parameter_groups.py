"""The role of each parameter in a model, and the optimizer groups that follow from it."""

from typing import Any, Literal

from torch import Tensor, nn

from moelm.config import OptimConfig
from moelm.model import Transformer
from moelm.model.attention import Attention
from moelm.model.feed_forward import FeedForward
from moelm.model.moe.experts import Experts
from moelm.model.moe.router import Router
from moelm.model.norm import RMSNorm

Role = Literal["embedding", "head", "attention", "ffn", "experts", "router", "norm"]
MUON_ROLES = ("attention", "ffn", "experts")
"""Roles whose parameters are matrices from one hidden vector to another, or stacks of them, one for each expert."""


def optimizer_of_role(config: OptimConfig, role: Role) -> Literal["adamw", "muon"]:
    """Which optimizer updates the parameters of a role."""
    wanted = getattr(config.groups, role).optimizer or config.kind
    return "muon" if wanted == "muon" and role in MUON_ROLES else "adamw"


def parameter_roles(model: Transformer) -> dict[nn.Parameter, Role]:
    """The role of every parameter, in the order of the model.

    The expert of a mixture of one has the role of the dense block, which it is equal to.
    """
    return {
        parameter: _role(name, module)
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
    return "head" if name == "head" else "attention"


def head_counts(model: Transformer) -> dict[Tensor, int]:
    """The number of heads whose rows each query, key and value projection consists of."""
    return {
        projection.weight: heads
        for module in model.modules()
        if isinstance(module, Attention)
        for projection, heads in ((module.wq, module.heads), (module.wk, module.kv_heads), (module.wv, module.kv_heads))
    }


def build_groups(model: Transformer, config: OptimConfig) -> list[dict[str, Any]]:
    """The optimizer's groups; parameters whose factor is 0 are frozen and belong to none.

    A group has the keys `params`, `kind` (`adamw` or `muon`), `lr_factor` (relative to `optim.lr`) and `weight_decay`.
    """
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for parameter, role in parameter_roles(model).items():
        settings = getattr(config.groups, role)
        parameter.requires_grad_(settings.lr > 0)
        if not parameter.requires_grad:
            continue
        kind = optimizer_of_role(config, role)
        relative = config.adamw.lr / config.lr if kind == "adamw" and config.adamw.lr is not None else 1.0
        weight_decay = settings.weight_decay
        if weight_decay is None:
            weight_decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        groups.setdefault((kind, settings.lr * relative, weight_decay), []).append(parameter)
    return [
        {"params": parameters, "kind": kind, "lr_factor": factor, "weight_decay": weight_decay}
        for (kind, factor, weight_decay), parameters in groups.items()
    ]
