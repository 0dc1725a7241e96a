"""The optimizer's groups, which follow from the roles of the parameters."""

from typing import Any, Literal

from torch import nn

from moelm.config import OptimConfig
from moelm.model import Transformer
from moelm.model.parametrization import lr_factor
from moelm.model.roles import HIDDEN_ROLES, Role, head_counts, parameter_roles


def optimizer_of_role(config: OptimConfig, role: Role) -> Literal["adamw", "muon"]:
    """Which optimizer updates the parameters of a role."""
    wanted = getattr(config.groups, role).optimizer or config.kind
    return "muon" if wanted == "muon" and role in HIDDEN_ROLES else "adamw"


def build_groups(model: Transformer, config: OptimConfig) -> list[dict[str, Any]]:
    """The optimizer's groups; parameters whose factor is 0 are frozen and belong to none.

    A group has the keys `params`, `kind` (`adamw` or `muon`), `lr_factor` (relative to `optim.lr`) and `weight_decay`. If
    the rate depends on the width (`moelm.model.parametrization`), the product of rate and decay does not.
    """
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    heads = head_counts(model) if config.split_heads else {}
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
        width_factor = lr_factor(model.config, role, kind, by_head=parameter in heads)
        key = (kind, settings.lr * relative * width_factor, weight_decay / width_factor)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "kind": kind, "lr_factor": factor, "weight_decay": weight_decay}
        for (kind, factor, weight_decay), parameters in groups.items()
    ]
