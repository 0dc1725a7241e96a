"""The decoder: embedding, pre-norm blocks of attention and feed-forward, output head.

Dense and sparse differ in `ffn` alone.

Shapes: B batch, T positions, D model width, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.model import noise
from moelm.model.attention import Attention, KVCache, LayerCache, rope_tables, visible_keys
from moelm.model.balance import bias_step
from moelm.model.experts import Experts
from moelm.model.ffn import DenseFFN
from moelm.model.loss import TokenLosses, next_token_losses
from moelm.model.moe import MoE
from moelm.model.passes import RMSNorm
from moelm.model.router import Routing, SigmoidRouter, TokenContext
from moelm.model.window import Windows


class ModelOutput(NamedTuple):
    """What a forward pass gives: scores of the next token or, where the targets are known, losses; and the routing."""

    logits: Tensor | None
    """`(B, T, V)`, of the last position alone `(B, 1, V)` if so asked; None where targets were given."""
    losses: TokenLosses | None
    """Of the targets; None where none were given."""
    routings: dict[int, Routing]
    """Each MoE layer's, keyed by its number on a token's way; empty for a dense model."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); sandwich norms also stand before each sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm(wanted: bool = True) -> nn.Module:
            return RMSNorm(config.dim, eps=config.norm_eps) if wanted else nn.Identity()

        self.attention_norm = norm()
        self.attention = Attention(config)
        self.attention_out_norm = norm(config.sandwich_norm)
        self.ffn_norm = norm()
        ffn = config.ffn_at(layer)
        self.ffn: nn.Module = (
            MoE(config, ffn, layer)
            if isinstance(ffn, MoEFFNConfig)
            else DenseFFN(config.dim, ffn.hidden_dim, ffn.depth, config.activation)
        )
        self.ffn_out_norm = norm(config.sandwich_norm)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Windows | None,
        cache: LayerCache | None,
        context: TokenContext,
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention_out_norm(self.attention(self.attention_norm(x_BTD), rope, mask, cache))
        y_BTD, routing = self.ffn(self.ffn_norm(x_BTD), context)
        return x_BTD + self.ffn_out_norm(y_BTD), routing


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape, with `vocab_size` set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size must be known before the model is built")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers_built))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.draws = any(getattr(module, "draws", False) for module in self.modules())
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
        draws_B: Tensor | None = None,
        targets_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Score the next token at every position.

        Args:
            tokens_BT: token ids.
            segments_BT: document number of each position, to stop attention at document borders.
            cache: what was seen before these positions; it is extended by them.
            valid_BT: False for padding, which takes no place in an expert.
            draws_B: a key for each row's random numbers (`noise.row_keys`), for routers that draw.
            targets_BT: the next tokens, negative where there is none to predict; asks for losses in place of logits.
            last_only: whether only the last position's logits are wanted.
        """
        config = self.config
        past = cache.length if cache is not None else 0
        queries = tokens_BT.shape[1]
        starts_B = cache.starts_B if cache is not None else None
        device = tokens_BT.device
        if cache is None:
            rope = rope_tables(torch.arange(queries, device=device), config.size_per_head, config.rope_theta)
        else:
            rope = cache.rope[0][past : past + queries], cache.rope[1][past : past + queries]
        mask = visible_keys(config, queries, past + queries, device, segments_BT, starts_B)
        keys_N = tokens_BT.new_empty(0)
        if self.draws:
            positions_BT = torch.arange(past, past + queries, device=device)[None]
            positions_BT = positions_BT if starts_B is None else positions_BT - starts_B[:, None]
            rows_B = torch.zeros_like(tokens_BT[:, 0]) if draws_B is None else draws_B
            keys_N = noise.token_keys(rows_B, positions_BT).flatten()
        context = TokenContext(tokens_BT.flatten(), keys_N, None if valid_BT is None else valid_BT.flatten())
        x_BTD = self.embedding(tokens_BT) * config.embedding_multiplier
        routings: dict[int, Routing] = {}
        for number, layer in enumerate(self.in_order):
            place = None if cache is None else LayerCache(cache, number)
            x_BTD, routing = layer(x_BTD, rope, mask, place, context.at_visit(number // config.layers_built))
            if routing is not None:
                routings[number] = routing
        if cache is not None:
            cache.advance(queries)
        head = self.embedding.weight if self.head is None else self.head.weight
        if last_only:
            x_BTD = x_BTD[:, -1:]
        x_BTD = self.norm(x_BTD) * config.output_multiplier
        if targets_BT is not None:
            return ModelOutput(None, next_token_losses(x_BTD.flatten(0, 1), head, targets_BT.flatten()), routings)
        return ModelOutput(F.linear(x_BTD, head), None, routings)

    @property
    def blocks(self) -> list[Block]:
        """The layers that have weights of their own, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def in_order(self) -> list[Block]:
        """The layers as a token meets them, some of them perhaps several times."""
        return self.blocks * (self.config.num_layers // self.config.layers_built)

    def recompute_hidden(self, wanted: bool) -> None:
        """Whether training makes the feed-forward blocks' hidden activations again rather than keep them."""
        for module in self.modules():
            if isinstance(module, DenseFFN | Experts):
                module.recompute = wanted

    @torch.no_grad()
    def move_biases(self, counts: dict[int, Tensor]) -> None:
        """After an optimizer step: move the selection bias of each layer that has one, by its assignments `(E,)`."""
        ffn, built = self.config.ffn, self.config.layers_built
        if isinstance(ffn, MoEFFNConfig) and ffn.balance.bias:
            for layer in [layer for layer in counts if layer < built]:
                bias_E = self.get_buffer(f"layers.{layer}.ffn.router.bias")
                over_visits = [counts_E for visit, counts_E in counts.items() if visit % built == layer]
                bias_E += bias_step(torch.stack(over_visits).sum(dim=0), ffn.balance.bias).to(bias_E)


def build_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """Build and initialise a model; on the `meta` device it has shapes and no values."""
    with torch.device(device):
        model = Transformer(config)
    if torch.device(device).type != "meta":
        initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Scaled normal init (GPT-2): std `init_std`, over sqrt(2 num_layers) for projections into the residual stream.

    Every matrix draws from its own stream, keyed by seed and name, and a dense block shares its name with the first
    expert. So a dense and a sparse model start with the same values wherever both have a weight, and a process that holds
    a part of the weights fills in that part. Norms start at one, routers that say so and all biases at zero.
    """
    config = model.config
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    zeros = {p for module in model.modules() if getattr(module, "zero_init", False) for p in module.parameters()}
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, SigmoidRouter):
            module.bias.zero_()
    for name, parameter in model.named_parameters():
        held, part = _part_here(parameter)
        if parameter.dim() == 1:
            continue
        if parameter in zeros:
            held.fill_(0.0)
            continue
        key = name.replace(".experts.", ".")
        std = residual_std if key.endswith(("wo.weight", "ffn.w2")) else config.init_std
        shape = parameter.shape[-2:]
        numbers = range(len(parameter))[part[0]] if parameter.dim() == 3 else range(1)
        for number, matrix in zip(numbers, held if parameter.dim() == 3 else (held,), strict=True):
            generator = noise.named_generator(f"{seed}/{key}/{number}")
            matrix.copy_(torch.empty(shape).normal_(0.0, std, generator=generator)[part[-2:]])


def _part_here(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this process holds of a parameter, and which part of the whole that is, by dimension."""
    part = [slice(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return parameter, tuple(part)
    mesh = parameter.device_mesh
    for direction, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            whole = parameter.shape[placement.dim]
            chunk = -(-whole // mesh.size(direction))
            start = min(whole, chunk * mesh.get_local_rank(direction))
            part[placement.dim] = slice(start, min(whole, start + chunk))
    return parameter.to_local(), tuple(part)
