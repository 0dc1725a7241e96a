"""Initial weights, the same for every sharding and, where weights correspond, for dense and sparse models."""

import math

import torch
from torch import Tensor, nn

from moelm.config import ModelConfig
from moelm.model import rng
from moelm.model.dtensor import local, local_slices
from moelm.model.moe.router import Router
from moelm.model.norm import RMSNorm
from moelm.model.parametrization import init_factor
from moelm.model.roles import parameter_roles
from moelm.model.transformer import Transformer


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Scaled normal init (GPT-2): std `init_std`, over sqrt(2 num_layers) for projections into the residual stream.

    Every matrix has a random generator of its own, seeded by its name, and a dense block has the name of the first expert.
    So a dense and a sparse model start with the same values where both have a weight, and a process that holds a shard
    initializes that shard. Norms start at one, routers with `zero_init` and all other vectors at zero. The embeddings have
    a random vector in common, with std `init_embedding_mean`. Where the parametrization depends on the width, standard
    deviations have the factors of `moelm.model.parametrization`.
    """
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    zeros = {
        p for module in model.modules() if isinstance(module, Router) and module.zero_init for p in module.parameters()
    }
    norms: set[Tensor] = set()
    roles = parameter_roles(model)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
            norms.update(module.parameters())
        elif isinstance(module, Router):
            module.reset_buffers()
    for name, parameter in model.named_parameters():
        own, index = local(parameter), local_slices(parameter)
        if parameter in norms:
            continue
        if parameter in zeros or parameter.dim() < 2:
            own.fill_(0.0)
            continue
        key = name.replace(".experts.", ".")
        std = residual_std if key.endswith(("wo.weight", "ffn.w2")) else config.init_std
        std *= init_factor(config, roles[parameter])
        stacked = parameter.dim() == 3
        experts = range(len(parameter))[index[0]] if stacked else range(1)
        for expert, matrix in zip(experts, own if stacked else (own,), strict=True):
            generator = rng.named_generator(f"{seed}/{key}/{expert}")
            matrix.copy_(torch.empty(parameter.shape[-2:]).normal_(0.0, std, generator=generator)[index[-2:]])
    if config.init_embedding_mean:
        generator = rng.named_generator(f"{seed}/embedding.mean")
        mean_D = torch.empty(config.dim).normal_(0.0, config.init_embedding_mean, generator=generator)
        own, index = local(model.embedding.weight), local_slices(model.embedding.weight)
        own.add_(mean_D[index[1]].to(own.device))


def build_from_weights(config: ModelConfig, weights: dict[str, Tensor], strict: bool = True) -> Transformer:
    """Build a model that uses these weights as they are, in their dtypes, without a copy.

    Args:
        strict: whether all weights are expected; otherwise the others are on the `meta` device, without values.
    """
    with torch.device("meta"):
        model = Transformer(config)
    assign_weights(model, weights, strict)
    return model


def assign_weights(module: nn.Module, weights: dict[str, Tensor], strict: bool = True) -> None:
    """Let a module on the `meta` device use these weights, and create its buffers that are no part of a state."""
    module.load_state_dict(weights, strict=strict, assign=True)
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.floor = torch.tensor(part.floor_value)
        elif isinstance(part, Router):
            part.stream = torch.tensor(part.layer)


def build_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """Build and initialize a model; on the `meta` device it has shapes and no values."""
    with torch.device(device):
        model = Transformer(config)
    if torch.device(device).type != "meta":
        initialize(model, seed)
    return model
