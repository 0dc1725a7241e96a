"""The forward pass of one new token per row on a CPU, where function calls cost more than arithmetic.

Everything that is constant during generation is computed once, each layer is a plain function, and the weights of an expert
are read only if a token selected it. Prompts and training use the modules.

Shapes: B rows, S positions seen so far, D model width, H query heads, G key/value heads, R = H/G, J = H+2G, C head width, K
choices per token, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.model import rng
from moelm.model.attention import Attention, attention_mask, capped_attention
from moelm.model.feed_forward import FeedForward
from moelm.model.kv_cache import KVCache
from moelm.model.moe.experts import Experts
from moelm.model.moe.layer import MoELayer
from moelm.model.moe.router import Routing, TokenContext
from moelm.model.norm import RMSNorm
from moelm.model.swiglu import split_depth, swiglu  # split_depth
from moelm.model.transformer import Transformer

Step = Callable[[Tensor], Tensor]


@torch.no_grad()
def build_decoder(model: Transformer, cache: KVCache) -> Step:
    """A function from the newest token of each row `(B)` to the logits of the next `(B, V)`; it extends the cache."""
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
        for number, block in enumerate(model.repeated_blocks)
    ]

    def step(tokens_B: Tensor) -> Tensor:
        position = cache.length
        mask = attention_mask(1, position + 1, config.window, embedding.device, None, cache.starts_B)
        x_BD = F.embedding(tokens_B, embedding) * config.embedding_multiplier
        context = _context(tokens_B, cache, model.needs_rng)
        for number, (attention_norm, attention, attention_out_norm, ffn_norm, ffn, ffn_out_norm) in enumerate(layers):
            y_BD = attention_out_norm(attention(attention_norm(x_BD), position, mask))
            x_BD = torch.add(x_BD, y_BD, alpha=config.residual_multiplier)
            y_BD = ffn_out_norm(ffn(ffn_norm(x_BD), context.at_repeat(number // config.num_unique_layers)))
            x_BD = torch.add(x_BD, y_BD, alpha=config.residual_multiplier)
        cache.advance(1)
        return F.linear(norm(x_BD) * config.logit_multiplier, head)

    return step


def _context(tokens_B: Tensor, cache: KVCache, needs_rng: bool) -> TokenContext:
    if not needs_rng:
        return TokenContext(tokens_B, tokens_B.new_empty(0))
    positions_B = torch.full_like(tokens_B, cache.length) - (0 if cache.starts_B is None else cache.starts_B)
    return TokenContext(tokens_B, rng.token_keys(torch.zeros_like(tokens_B), positions_B[:, None]).flatten())


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
    weight = torch.cat((module.wq.weight, module.wk.weight, module.wv.weight))  # one product is faster for one token
    biases = module.wq.bias, module.wk.bias, module.wv.bias
    bias = None if biases[0] is None else torch.cat(biases)
    out_weight, out_bias, cap = module.wo.weight, module.wo.bias, module.logit_cap
    keys, values = cache.layers[layer]
    cos_TC, sin_TC = cache.rope
    q_norm, k_norm, query_factor = _norm(module.q_norm), _norm(module.k_norm), module.query_factor
    all_heads, rotated = module.qk_norm == "all_heads", cos_TC.shape[-1]

    def attention(x_BD: Tensor, position: int, mask: Tensor | None) -> Tensor:
        qkv_BJC = F.linear(x_BD, weight, bias).view(len(x_BD), -1, width)
        qk_BHC, v_BGC = qkv_BJC[:, :-kv_heads], qkv_BJC[:, -kv_heads:]
        if module.qk_norm:
            q_BHC, k_BGC = qk_BHC[:, :heads], qk_BHC[:, heads:]
            if all_heads:
                q_BHC, k_BGC = q_norm(q_BHC.flatten(1)).view_as(q_BHC), k_norm(k_BGC.flatten(1)).view_as(k_BGC)
            else:
                q_BHC, k_BGC = q_norm(q_BHC), k_norm(k_BGC)
            qk_BHC = torch.cat((q_BHC, k_BGC), dim=1)
        first_BHR = qk_BHC[..., :rotated]
        swapped_BHR = first_BHR.roll(rotated // 2, dims=-1)
        first_BHR = torch.addcmul(first_BHR * cos_TC[position], swapped_BHR, sin_TC[position])
        qk_BHC = first_BHR if rotated == width else torch.cat((first_BHR, qk_BHC[..., rotated:]), dim=-1)
        keys.select(2, position).copy_(qk_BHC[:, heads:])
        values.select(2, position).copy_(v_BGC)
        q_BHC = qk_BHC[:, :heads].to(x_BD.dtype)
        if query_factor != 1:
            q_BHC = q_BHC * query_factor
        k_BGSC, v_BGSC = (memory.narrow(2, 0, position + 1).to(x_BD.dtype) for memory in (keys, values))
        if cap is not None:
            output = capped_attention(q_BHC[:, :, None], k_BGSC, v_BGSC, mask, cap)
        else:
            # Heads that share keys take the dimension of query positions, so that no key is copied.
            output = F.scaled_dot_product_attention(
                q_BHC.view(len(x_BD), kv_heads, -1, width), k_BGSC, v_BGSC, attn_mask=mask
            )
        return F.linear(output.reshape(len(x_BD), -1), out_weight, out_bias)

    return attention


def _ffn(module: nn.Module) -> Callable[[Tensor, TokenContext], Tensor]:
    if isinstance(module, MoELayer):
        return _moe(module)
    assert isinstance(module, FeedForward)
    weights, depth, activation = (module.w1, module.w2, module.w3), module.depth, module.activation
    return lambda x_BD, context: split_depth(x_BD, weights, depth, lambda x_BD, part: swiglu(x_BD, *part, activation))


def _moe(module: MoELayer) -> Callable[[Tensor, TokenContext], Tensor]:
    experts = _experts(module.experts)
    shared = None if module.shared is None else _shared(module.shared, module.shared_gate)

    def moe(x_BD: Tensor, context: TokenContext) -> Tensor:
        routing: Routing = module.router(x_BD, context)
        y_BD = experts(x_BD, routing)
        return y_BD if shared is None else y_BD + shared(x_BD, context)

    return moe


def _shared(module: FeedForward, gate: nn.Linear | None) -> Callable[[Tensor, TokenContext], Tensor]:
    ffn = _ffn(module)
    if gate is None:
        return ffn
    return lambda x_BD, context: gate(x_BD).sigmoid() * ffn(x_BD, context)


def _experts(module: Experts) -> Callable[[Tensor, Routing], Tensor]:
    """The gated sum of the selected experts; the few rows are sorted on the host."""
    weights: list[tuple[Tensor, Tensor, Tensor]] = list(
        zip(module.w1.unbind(), module.w2.unbind(), module.w3.unbind(), strict=True)
    )
    depth, activation = module.depth, module.activation

    def experts(x_BD: Tensor, routing: Routing) -> Tensor:
        rows, top_k = routing.experts_NK.shape
        experts_M = routing.experts_NK.flatten().tolist()
        order_M = sorted(range(len(experts_M)), key=experts_M.__getitem__)
        counts: dict[int, int] = {}
        for m in order_M:
            counts[experts_M[m]] = counts.get(experts_M[m], 0) + 1
        order = torch.tensor(order_M)
        x_SD = x_BD.index_select(0, order // top_k)
        slices = torch.split(x_SD, list(counts.values()))
        parts = [
            split_depth(x, weights[e], depth, lambda x, part: swiglu(x, *part, activation))
            for e, x in zip(counts, slices, strict=True)
        ]
        y_SD = torch.cat(parts) * routing.gates_NK.flatten().index_select(0, order)[:, None].to(x_BD.dtype)
        return torch.empty_like(y_SD).index_copy_(0, order, y_SD).view(rows, top_k, -1).sum(dim=1)

    return experts
