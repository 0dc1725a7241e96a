"""Causal self-attention: grouped queries, sliding window, document mask, logit cap.

Shapes: B batch, T query positions, S key positions, D model width, H query heads, G key/value heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from moelm.config import ModelConfig
from moelm.model.backend import compute_dtype
from moelm.model.flex_attention import flex_mask, flex_masked_attention, use_flex_attention
from moelm.model.kv_cache import LayerCache
from moelm.model.norm import RMSNorm
from moelm.model.rope import rotate
from moelm.model.sliding_window import WindowBlocks, masked_attention, window_blocks, windowed_attention

Mask = Tensor | WindowBlocks | BlockMask
"""Which keys each query attends to."""

SHORT = 512
"""Positions up to which `short_causal_attention` is faster."""


def build_mask(
    config: ModelConfig,
    queries: int,
    keys: int,
    device: torch.device,
    segments_BT: Tensor | None = None,
    starts_B: Tensor | None = None,
    compiled: bool = False,
) -> Mask | None:
    """The mask of every layer in its cheapest form; None for plain causal attention.

    Args:
        compiled: whether the attention is compiled.
    """
    window, cap = config.window, config.attention_logit_cap
    windowed, complete = window is not None and window < keys, queries == keys and starts_B is None
    plain = not windowed and segments_BT is None and cap is None
    if complete and not plain and use_flex_attention(config, device, compiled):
        return flex_mask(keys, window, segments_BT, device)
    if window is not None and windowed and complete and segments_BT is None and cap is None:
        return window_blocks(window, device)
    return attention_mask(queries, keys, window, device, segments_BT, starts_B)


def attention_mask(
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
    segments_BT: Tensor | None = None,
    starts_B: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query attends to; None for plain causal attention (or all keys, for one query).

    Args:
        queries: query positions, the last of the `keys` positions.
        keys: key positions.
        window: positions that a query attends to, itself included; None for all before it.
        segments_BT: document index of each position; attention stays within a document (needs queries == keys).
        starts_B: first real key of each row, for prompts padded on the left.

    Returns:
        A boolean tensor that broadcasts to `(B, 1, T, S)`, or None.
    """
    reach = min(window or keys, keys)
    windowed = reach < keys
    plain = not windowed and segments_BT is None and starts_B is None
    if plain and queries in (1, keys):
        return None
    key_S = torch.arange(keys, device=device)
    query_T1 = key_S[keys - queries :, None]
    mask = key_S <= query_T1
    if windowed:
        mask = mask & (key_S > query_T1 - reach)
    mask = mask[None, None]
    if segments_BT is not None:
        mask = mask & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    if starts_B is not None:
        # A padding query attends to itself, so that its softmax is not over an empty set; its output is not used.
        mask = mask & ((key_S >= starts_B[:, None, None, None]) | (key_S == query_T1))
    return mask


def capped_attention(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention with logits limited to ±cap by cap * tanh(logit / cap) before masking; softmax in float32 (Grok-1).

    Args:
        mask: from `attention_mask`; None is plain causal attention.
    """
    group_size = q_BHTC.shape[1] // k_BGSC.shape[1]
    k_BHSC, v_BHSC = k_BGSC.repeat_interleave(group_size, dim=1), v_BGSC.repeat_interleave(group_size, dim=1)
    logits_BHTS = (q_BHTC @ k_BHSC.transpose(2, 3)).float() * q_BHTC.shape[-1] ** -0.5
    logits_BHTS = cap * (logits_BHTS / cap).tanh()
    if mask is None and q_BHTC.shape[2] > 1:
        mask = torch.ones(logits_BHTS.shape[2:], dtype=torch.bool, device=q_BHTC.device).tril()
    if mask is not None:
        logits_BHTS = logits_BHTS.masked_fill(~mask, float("-inf"))
    output_BHTC: Tensor = logits_BHTS.softmax(dim=-1).to(v_BHSC.dtype) @ v_BHSC
    return output_BHTC


def short_causal_attention(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
    """Causal attention as two batched products and a softmax, with all logits in memory.

    On a CPU in bfloat16 it takes a third of the time of `F.scaled_dot_product_attention`, forward and backward, if
    sequences are short. Logits are rounded to bfloat16.
    """
    batch, heads, length, _ = q_BHTC.shape
    group_size = heads // k_BGTC.shape[1]
    if group_size > 1:
        k_BGTC, v_BGTC = (x.repeat_interleave(group_size, dim=1) for x in (k_BGTC, v_BGTC))
    q_NTC, k_NTC, v_NTC = (x.reshape(batch * heads, length, -1) for x in (q_BHTC, k_BGTC, v_BGTC))
    mask_TT = torch.full((length, length), float("-inf"), dtype=q_NTC.dtype).triu(1)
    logits_NTT = torch.baddbmm(mask_TT, q_NTC, k_NTC.transpose(1, 2), alpha=q_NTC.shape[-1] ** -0.5)
    return torch.bmm(logits_NTT.softmax(dim=-1), v_NTC).view(batch, heads, length, -1)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.logit_cap = config.attention_logit_cap
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.size_per_head
        self.wq = nn.Linear(config.dim, self.heads * self.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(self.heads * self.head_dim, config.dim, bias=config.attention_output_bias)
        self.qk_norm = config.qk_norm
        self.q_norm, self.k_norm = (self._head_norm(config, heads) for heads in (self.heads, self.kv_heads))
        # The kernels divide logits by sqrt(head_dim).
        multiplier = config.attention_multiplier
        self.query_factor = 1.0 if multiplier is None else multiplier * self.head_dim**0.5

    @staticmethod
    def _head_norm(config: ModelConfig, heads: int) -> nn.Module:
        if not config.qk_norm:
            return nn.Identity()
        width = config.size_per_head * (heads if config.qk_norm == "all_heads" else 1)
        return RMSNorm(width, eps=config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend; `mask` is from `build_mask`, for these queries and all keys including cached ones."""
        q_BHTC, k_BGSC, v_BGSC = self._project(x_BTD, rope)
        if cache is not None:
            k_BGSC, v_BGSC = cache.append(k_BGSC, v_BGSC)
        output_BTHC = self._attend(q_BHTC, k_BGSC, v_BGSC, mask).transpose(1, 2)
        output_BTD: Tensor = self.wo(output_BTHC.flatten(2))
        return output_BTD

    def _project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; queries and keys are normalized and rotated."""
        x_BTD = x_BTD.to(compute_dtype(x_BTD))  # autocast would store a cast for each of the three products
        q_BTHC, k_BTGC, v_BTGC = (w(x_BTD).unflatten(2, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.qk_norm == "all_heads":
            q_BTHC, k_BTGC = self.q_norm(q_BTHC.flatten(2)).view_as(q_BTHC), self.k_norm(k_BTGC.flatten(2)).view_as(k_BTGC)
        else:
            q_BTHC, k_BTGC = self.q_norm(q_BTHC), self.k_norm(k_BTGC)
        if self.query_factor != 1:
            q_BTHC = q_BTHC * self.query_factor
        q_BHTC, k_BGTC = (rotate(x, *rope).transpose(1, 2) for x in (q_BTHC, k_BTGC))
        return q_BHTC, k_BGTC, v_BTGC.transpose(1, 2)

    def _attend(self, q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Mask | None) -> Tensor:
        if isinstance(mask, BlockMask):
            return flex_masked_attention(q_BHTC, k_BGSC, v_BGSC, mask, self.logit_cap)
        if isinstance(mask, WindowBlocks):
            return windowed_attention(q_BHTC, k_BGSC, v_BGSC, mask)
        if self.logit_cap is not None:
            return capped_attention(q_BHTC, k_BGSC, v_BGSC, mask, self.logit_cap)
        if mask is not None:
            return masked_attention(q_BHTC, k_BGSC, v_BGSC, mask)
        causal, grouped = q_BHTC.shape[2] > 1, self.heads != self.kv_heads
        if causal and q_BHTC.device.type == "cpu" and q_BHTC.dtype == torch.bfloat16 and q_BHTC.shape[2] <= SHORT:
            return short_causal_attention(q_BHTC, k_BGSC, v_BGSC)
        return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, is_causal=causal, enable_gqa=grouped)
