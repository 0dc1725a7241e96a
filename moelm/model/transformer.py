"""The decoder: embedding, pre-norm blocks of attention and feed-forward, output head. Dense and sparse models differ in
`ffn` alone.

Shapes: B batch, T positions, D model width, V vocabulary, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.model import rng
from moelm.model.attention import Attention, Mask, build_mask
from moelm.model.feed_forward import FeedForward
from moelm.model.kv_cache import KVCache, LayerCache
from moelm.model.loss import TokenLosses, next_token_losses
from moelm.model.moe.balance import expert_bias_delta
from moelm.model.moe.experts import Experts
from moelm.model.moe.layer import MoELayer
from moelm.model.moe.router import Router, Routing, TokenContext
from moelm.model.norm import RMSNorm
from moelm.model.rope import rope_tables


class ModelOutput(NamedTuple):
    """The result of a forward pass: logits or, if targets were given, losses; and the routing."""

    logits: Tensor | None
    """`(B, T, V)`, or `(B, 1, V)` with `last_only`; None if targets were given."""
    losses: TokenLosses | None
    """Losses at the targets; None if none were given."""
    routings: dict[int, Routing]
    """By layer, repeats counted; empty for a dense model."""


class BlockInputs(NamedTuple):
    """What all blocks read in addition to their input."""

    rope: tuple[Tensor, Tensor]
    mask: Mask | None
    context: TokenContext


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); with sandwich norms, the outputs are normalized before each sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm(wanted: bool = True) -> nn.Module:
            return RMSNorm(config.dim, eps=config.norm_eps) if wanted else nn.Identity()

        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm()
        self.attention = Attention(config)
        self.attention_out_norm = norm(config.sandwich_norm)
        self.ffn_norm = norm()
        ffn = config.ffn_at(layer)
        self.ffn: nn.Module = (
            MoELayer(config, ffn, layer)
            if isinstance(ffn, MoEFFNConfig)
            else FeedForward(config.dim, ffn.hidden_dim, ffn.depth, config.activation)
        )
        self.ffn_out_norm = norm(config.sandwich_norm)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: LayerCache | None,
        context: TokenContext,
    ) -> tuple[Tensor, Routing | None]:
        return self.add_ffn(self.add_attention(x_BTD, rope, mask, cache), context)

    def add_attention(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """The first half of the block."""
        y_BTD: Tensor = self.attention(self.attention_norm(x_BTD), rope, mask, cache)
        return x_BTD + self._scaled(self.attention_out_norm(y_BTD))

    def add_ffn(self, x_BTD: Tensor, context: TokenContext) -> tuple[Tensor, Routing | None]:
        """The second half of the block, and the routing of a sparse one."""
        y_BTD, routing = self.ffn(self.ffn_norm(x_BTD), context)
        return x_BTD + self.scale_ffn(y_BTD), routing

    def scale_ffn(self, y_BTD: Tensor) -> Tensor:
        """The output of the feed-forward block as it is added to the residual stream."""
        return self._scaled(self.ffn_out_norm(y_BTD))

    def _scaled(self, y_BTD: Tensor) -> Tensor:
        return y_BTD if self.residual_multiplier == 1 else y_BTD * self.residual_multiplier


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape, with `vocab_size` set.
    """

    compiled_blocks = False
    """Whether each block is compiled by itself."""

    resident: Callable[[Block], AbstractContextManager[object]] = nullcontext
    """A context in which a block has its weights in memory; another one where they are read when they are needed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size must be known before the model is built")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_unique_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.needs_rng = any(module.needs_rng for module in self.modules() if isinstance(module, Router))
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
        rng_keys_B: Tensor | None = None,
        targets_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Compute next-token logits or losses at every position.

        Args:
            tokens_BT: token ids.
            segments_BT: document index of each position, to stop attention at document boundaries.
            cache: keys and values of earlier positions; these positions are appended.
            valid_BT: False for padding, which is not counted towards an expert's capacity.
            rng_keys_B: keys of each row's random numbers (`rng.row_keys`), for routers that need them.
            targets_BT: the next tokens, negative where there is none; requests losses instead of logits.
            last_only: whether only the logits of the last position are computed.
        """
        inputs = self.block_inputs(tokens_BT, segments_BT, cache, valid_BT, rng_keys_B)
        x_BTD = self.embed(tokens_BT)
        routings: dict[int, Routing] = {}
        for number, block in enumerate(self.repeated_blocks):
            layer_cache = None if cache is None else LayerCache(cache, number)
            x_BTD, routing = block(x_BTD, inputs.rope, inputs.mask, layer_cache, self.context_at(number, inputs))
            if routing is not None:
                routings[number] = routing
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        if last_only:
            x_BTD = x_BTD[:, -1:]
        if targets_BT is not None:
            return ModelOutput(None, self.losses(x_BTD.flatten(0, 1), targets_BT.flatten()), routings)
        return ModelOutput(F.linear(self._head_input(x_BTD), self._head_weight), None, routings)

    def block_inputs(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
        rng_keys_B: Tensor | None = None,
    ) -> BlockInputs:
        """What all blocks read in addition to their input; arguments are those of `forward`."""
        config, device = self.config, tokens_BT.device
        past = cache.length if cache is not None else 0
        queries = tokens_BT.shape[1]
        starts_B = cache.starts_B if cache is not None else None
        if cache is None:
            rope = rope_tables(torch.arange(queries, device=device), config)
        else:
            rope = cache.rope[0][past : past + queries], cache.rope[1][past : past + queries]
        compiled = torch.compiler.is_compiling() or self.compiled_blocks
        mask = build_mask(config, queries, past + queries, device, segments_BT, starts_B, compiled)
        return BlockInputs(rope, mask, self._context(tokens_BT, past, starts_B, valid_BT, rng_keys_B))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The input of the first block."""
        x_BTD: Tensor = self.embedding(tokens_BT)
        return x_BTD * self.config.embedding_multiplier

    def context_at(self, number: int, inputs: BlockInputs) -> TokenContext:
        """What the router of a layer reads, repeats counted."""
        return inputs.context.at_repeat(number // self.config.num_unique_layers)

    def losses(self, x_ND: Tensor, targets_N: Tensor) -> TokenLosses:
        """Losses of tokens, given the output of the last block for them."""
        return next_token_losses(self._head_input(x_ND), self._head_weight, targets_N)

    def _head_input(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.norm(x_BTD)
        return x_BTD * self.config.logit_multiplier

    @property
    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _context(
        self,
        tokens_BT: Tensor,
        past: int,
        starts_B: Tensor | None,
        valid_BT: Tensor | None,
        rng_keys_B: Tensor | None,
    ) -> TokenContext:
        rng_keys_N = tokens_BT.new_empty(0)
        if self.needs_rng:
            positions_BT = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)[None]
            positions_BT = positions_BT if starts_B is None else positions_BT - starts_B[:, None]
            rows_B = torch.zeros_like(tokens_BT[:, 0]) if rng_keys_B is None else rng_keys_B
            rng_keys_N = rng.token_keys(rows_B, positions_BT).flatten()
        return TokenContext(tokens_BT.flatten(), rng_keys_N, None if valid_BT is None else valid_BT.flatten())

    @property
    def blocks(self) -> list[Block]:
        """The blocks with weights of their own."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def repeated_blocks(self) -> list[Block]:
        """The blocks in the order of computation, repeats included."""
        return self.blocks * (self.config.num_layers // self.config.num_unique_layers)

    def set_recompute_hidden(self, recompute: bool) -> None:
        """Set whether feed-forward blocks recompute their hidden activations in the backward pass."""
        for module in self.modules():
            if isinstance(module, FeedForward | Experts):
                module.recompute = recompute

    @torch.no_grad()
    def update_expert_bias(self, counts: dict[int, Tensor]) -> None:
        """Update the selection biases of loss-free balancing, after an optimizer step.

        Args:
            counts: assignments `(E,)` by layer, repeats counted.
        """
        ffn, unique = self.config.ffn, self.config.num_unique_layers
        if isinstance(ffn, MoEFFNConfig) and ffn.balance.bias:
            for layer in [layer for layer in counts if layer < unique]:
                bias_E = self.get_buffer(f"layers.{layer}.ffn.router.bias")
                over_repeats = [counts_E for number, counts_E in counts.items() if number % unique == layer]
                bias_E += expert_bias_delta(torch.stack(over_repeats).sum(dim=0), ffn.balance.bias).to(bias_E)
