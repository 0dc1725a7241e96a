"""The same forward pass for one new position of each row, on a CPU, where calls cost more than arithmetic.

Everything that does not change while text is written is made once, each layer is a plain function, and an expert's weights
are read only when a token chose it. Prompts and training go through the modules.

Shapes: B rows, S positions seen so far, D model width, H query heads, G key/value heads, R = H/G, J = H+2G, C head width, K
choices per token, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.model import noise
from moelm.model.attention import Attention, KVCache, attention_mask, capped_attention
from moelm.model.experts import Experts
from moelm.model.ffn import DenseFFN
from moelm.model.gated import gated, in_layers
from moelm.model.moe import MoE
from moelm.model.passes import RMSNorm
from moelm.model.router import Routing, TokenContext
from moelm.model.transformer import Transformer

Step = Callable[[Tensor], Tensor]


@torch.no_grad()
def build_decoder(model: Transformer, cache: KVCache) -> Step:
    """A function from the newest token of each row `(B)` to the scores of the next `(B, V)`; it extends the cache."""
    config = model.config
    embedding = model.embedding.weight
    head = embedding if model.head is None else model.head.weight
    norm = _norm(model.norm)
    layers = [
        (
            _norm(block.attention_norm),
            _attention(block.attention, cache, number),
            _norm(block.attention_out_norm),
            _norm(block.ffn_norm),
            _ffn(block.ffn),
            _norm(block.ffn_out_norm),
        )
        for number, block in enumerate(model.in_order)
    ]

    def step(tokens_B: Tensor) -> Tensor:
        place = cache.length
        mask = attention_mask(1, place + 1, config.window, embedding.device, None, cache.starts_B)
        x_BD = F.embedding(tokens_B, embedding) * config.embedding_multiplier
        context = _context(tokens_B, cache, model.draws)
        for number, (attention_norm, attention, attention_out_norm, ffn_norm, ffn, ffn_out_norm) in enumerate(layers):
            x_BD = x_BD + attention_out_norm(attention(attention_norm(x_BD), place, mask))
            x_BD = x_BD + ffn_out_norm(ffn(ffn_norm(x_BD), context.at_visit(number // config.layers_built)))
        cache.advance(1)
        return F.linear(norm(x_BD) * config.output_multiplier, head)

    return step


def _context(tokens_B: Tensor, cache: KVCache, draws: bool) -> TokenContext:
    if not draws:
        return TokenContext(tokens_B, tokens_B.new_empty(0))
    places_B = torch.full_like(tokens_B, cache.length) - (0 if cache.starts_B is None else cache.starts_B)
    return TokenContext(tokens_B, noise.token_keys(torch.zeros_like(tokens_B), places_B[:, None]).flatten())


def _norm(module: nn.Module) -> Step:
    if not isinstance(module, RMSNorm):
        return lambda x: x
    weight_C, floor = module.weight * math.sqrt(len(module.weight)), module.floor

    def norm(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(floor)
        return x.div(size).mul_(weight_C).to(x.dtype)

    return norm


def _attention(module: Attention, cache: KVCache, layer: int) -> Callable[[Tensor, int, Tensor | None], Tensor]:
    heads, kv_heads, width = module.heads, module.kv_heads, module.head_dim
    weight, out_weight, cap = module.fuse(), module.wo.weight, module.logit_cap
    keys, values = cache.memory[layer]
    cos_TC, sin_TC = cache.rope
    q_norm, k_norm = _norm(module.q_norm), _norm(module.k_norm)

    def attention(x_BD: Tensor, place: int, mask: Tensor | None) -> Tensor:
        all_BJC = F.linear(x_BD, weight).view(len(x_BD), -1, width)
        turned_BJC, v_BGC = all_BJC[:, :-kv_heads], all_BJC[:, -kv_heads:]
        if module.normed:
            turned_BJC = torch.cat((q_norm(turned_BJC[:, :heads]), k_norm(turned_BJC[:, heads:])), dim=1)
        swapped_BJC = turned_BJC.roll(width // 2, dims=-1)
        turned_BJC = torch.addcmul(turned_BJC * cos_TC[place], swapped_BJC, sin_TC[place])
        keys.select(2, place).copy_(turned_BJC[:, heads:])
        values.select(2, place).copy_(v_BGC)
        q_BHC = turned_BJC[:, :heads].to(x_BD.dtype)
        k_BGSC, v_BGSC = (memory.narrow(2, 0, place + 1).to(x_BD.dtype) for memory in (keys, values))
        if cap is not None:
            mixed = capped_attention(q_BHC[:, :, None], k_BGSC, v_BGSC, mask, cap)
        else:
            # The heads that share keys stand where positions stand elsewhere, so that no key is copied.
            mixed = F.scaled_dot_product_attention(
                q_BHC.view(len(x_BD), kv_heads, -1, width), k_BGSC, v_BGSC, attn_mask=mask
            )
        return F.linear(mixed.reshape(len(x_BD), -1), out_weight)

    return attention


def _ffn(module: nn.Module) -> Callable[[Tensor, TokenContext], Tensor]:
    if isinstance(module, MoE):
        return _moe(module)
    assert isinstance(module, DenseFFN)
    weights, depth, activation = (module.w1, module.w2, module.w3), module.depth, module.activation
    return lambda x_BD, context: in_layers(x_BD, weights, depth, lambda x_BD, part: gated(x_BD, *part, activation))


def _moe(module: MoE) -> Callable[[Tensor, TokenContext], Tensor]:
    experts = _experts(module.experts)
    shared = None if module.shared is None else _ffn(module.shared)

    def moe(x_BD: Tensor, context: TokenContext) -> Tensor:
        routing: Routing = module.router(x_BD, context)
        y_BD = experts(x_BD, routing)
        return y_BD if shared is None else y_BD + shared(x_BD, context)

    return moe


def _experts(module: Experts) -> Callable[[Tensor, Routing], Tensor]:
    """The weighed sum of the chosen experts; the few rows are sorted on the host."""
    each: list[tuple[Tensor, Tensor, Tensor]] = list(
        zip(module.w1.unbind(), module.w2.unbind(), module.w3.unbind(), strict=True)
    )
    depth, activation = module.depth, module.activation

    def experts(x_BD: Tensor, routing: Routing) -> Tensor:
        rows, top_k = routing.experts_NK.shape
        chosen_M = routing.experts_NK.flatten().tolist()
        order_M = sorted(range(len(chosen_M)), key=chosen_M.__getitem__)
        counts: dict[int, int] = {}
        for m in order_M:
            counts[chosen_M[m]] = counts.get(chosen_M[m], 0) + 1
        order = torch.tensor(order_M)
        x_SD = x_BD.index_select(0, order // top_k)
        slices = torch.split(x_SD, list(counts.values()))
        parts = [
            in_layers(x, each[e], depth, lambda x, part: gated(x, *part, activation))
            for e, x in zip(counts, slices, strict=True)
        ]
        y_SD = torch.cat(parts) * routing.gates_NK.flatten().index_select(0, order)[:, None].to(x_BD.dtype)
        return torch.empty_like(y_SD).index_copy_(0, order, y_SD).view(rows, top_k, -1).sum(dim=1)

    return experts
