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

BLOCK_ELEMENTS = 2**22
"""Elements of a matrix with one random generator, in whole rows; a process draws the blocks that its shard is in."""


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Scaled normal init (GPT-2): std `init_std`, over sqrt(2 num_layers) for projections into the residual stream.

    Every matrix has random generators of its own, seeded by its name, and a dense block has the name of the first expert.
    So a dense and a sparse model start with the same values where both have a weight, and a process that holds a shard
    draws little more than that shard. Norms start at one, routers with `zero_init` and all other vectors at zero. The
    embeddings have a random vector in common, with std `init_embedding_mean`. Where the parametrization depends on the
    width, standard deviations have the factors of `moelm.model.parametrization`.
    """
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    zeros = {
        p for module in model.modules() if isinstance(module, Router) and module.zero_init for p in module.parameters()
    }
    norms = reset_norms_and_buffers(model)
    roles = parameter_roles(model)
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
            _draw_rows(matrix, index[-2], parameter.shape[-2], std, f"{seed}/{key}/{expert}")
    if config.init_embedding_mean:
        generator = rng.named_generator(f"{seed}/embedding.mean")
        mean_D = torch.empty(config.dim).normal_(0.0, config.init_embedding_mean, generator=generator)
        own, index = local(model.embedding.weight), local_slices(model.embedding.weight)
        own.add_(mean_D[index[1]].to(own.device))


def _draw_rows(own: Tensor, rows: slice, num_rows: int, std: float, name: str) -> None:
    """Fill some rows of a matrix with normal values, which do not depend on which rows they are."""
    columns = own.shape[1]
    height = max(1, BLOCK_ELEMENTS // columns)
    for first in range(rows.start // height * height, rows.stop, height):
        generator = rng.named_generator(f"{name}/{first}" if first else name)
        block = torch.empty(min(height, num_rows - first), columns).normal_(0.0, std, generator=generator)
        start, stop = max(first, rows.start), min(first + height, rows.stop)
        own[start - rows.start : stop - rows.start].copy_(block[start - first : stop - first])


@torch.no_grad()
def reset_norms_and_buffers(model: Transformer) -> set[Tensor]:
    """Set what does not depend on the seed; returns the weights of the norms."""
    norms: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
            norms.update(module.parameters())
        elif isinstance(module, Router):
            module.reset_buffers()
    return norms


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
