"""Causal self-attention: rotary positions, grouped queries, sliding window, document mask, key/value cache.

Shapes: B batch, T query positions, S key positions, D model width, H query heads, G key/value heads, C head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ModelConfig
from moelm.model.passes import RMSNorm, rotate
from moelm.model.window import Windows, plan_windows, windowed_attention


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021), in the rotate-half layout, for `rotate`.

    Returns:
        Two float32 tensors of shape `(T, head_dim)`; the sines of the first half are negated.
    """
    powers = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T.float()[:, None] * theta**-powers
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def visible_keys(
    config: ModelConfig,
    queries: int,
    keys: int,
    device: torch.device,
    segments_BT: Tensor | None = None,
    starts_B: Tensor | None = None,
) -> Tensor | Windows | None:
    """What every layer's queries see, in the form that costs least: nothing to say, a window in blocks, or a mask."""
    window = config.window
    whole = queries == keys and segments_BT is None and starts_B is None
    if window is not None and window < keys and whole and config.attention_logit_cap is None:
        return plan_windows(window, device)
    return attention_mask(queries, keys, window, device, segments_BT, starts_B)


def attention_mask(
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
    segments_BT: Tensor | None = None,
    starts_B: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query sees; None where plain causal attention (or all keys, for one query) says it.

    Args:
        queries: query positions; they are the last of the `keys` positions.
        keys: key positions.
        window: positions that a query sees, itself included, or None for all before it.
        segments_BT: document number of each position; attention stays inside a document (needs queries == keys).
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
    seen = key_S <= query_T1
    if windowed:
        seen = seen & (key_S > query_T1 - reach)
    seen = seen[None, None]
    if segments_BT is not None:
        seen = seen & (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    if starts_B is not None:
        # A padding query sees itself, so that its row of the softmax is not empty; nobody reads its output.
        seen = seen & ((key_S >= starts_B[:, None, None, None]) | (key_S == query_T1))
    return seen


def capped_attention(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention whose logits are squashed into ±cap by cap * tanh(logit / cap), then masked; softmax in float32 (Grok-1).

    Args:
        mask: that of `attention_mask`; None is plain causal attention.
    """
    shared = q_BHTC.shape[1] // k_BGSC.shape[1]
    k_BHSC, v_BHSC = k_BGSC.repeat_interleave(shared, dim=1), v_BGSC.repeat_interleave(shared, dim=1)
    logits_BHTS = (q_BHTC @ k_BHSC.transpose(2, 3)).float() * q_BHTC.shape[-1] ** -0.5
    logits_BHTS = cap * (logits_BHTS / cap).tanh()
    if mask is None and q_BHTC.shape[2] > 1:
        mask = torch.ones(logits_BHTS.shape[2:], dtype=torch.bool, device=q_BHTC.device).tril()
    if mask is not None:
        logits_BHTS = logits_BHTS.masked_fill(~mask, float("-inf"))
    mixed_BHTC: Tensor = logits_BHTS.softmax(dim=-1).to(v_BHSC.dtype) @ v_BHSC
    return mixed_BHTC


class KVCache:
    """Keys and values of every layer for the positions seen so far, in preallocated memory.

    Args:
        starts_B: first real position of each row when prompts are padded on the left.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        starts_B: Tensor | None = None,
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.size_per_head)
        self.memory = [
            (torch.empty(shape, device=device), torch.empty(shape, device=device)) for _ in range(config.num_layers)
        ]
        self.rope = rope_tables(torch.arange(capacity, device=device), config.size_per_head, config.rope_theta)
        self.length = 0
        self.starts_B = starts_B

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has now appended."""
        self.length += positions


class LayerCache(NamedTuple):
    """One layer's place in a cache."""

    cache: KVCache
    layer: int

    def append(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest keys and values and return all of them; the cache's `advance` moves on afterwards."""
        length, new = self.cache.length, k_BGTC.shape[2]
        seen = []
        for memory, latest in zip(self.cache.memory[self.layer], (k_BGTC, v_BGTC), strict=True):
            memory.narrow(2, length, new).copy_(latest)
            seen.append(memory.narrow(2, 0, length + new).to(latest.dtype))
        return seen[0], seen[1]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.logit_cap = config.attention_logit_cap
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.size_per_head
        self.wq = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.normed = config.qk_norm
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | Windows | None, cache: LayerCache | None = None
    ) -> Tensor:
        """Mix positions; `mask` is that of `visible_keys` for these queries and all keys, the cached ones included."""
        q_BHTC, k_BGSC, v_BGSC = self._project(x_BTD, rope)
        if cache is not None:
            k_BGSC, v_BGSC = cache.append(k_BGSC, v_BGSC)
        mixed_BTHC = self._mix(q_BHTC, k_BGSC, v_BGSC, mask).transpose(1, 2)
        mixed: Tensor = self.wo(mixed_BTHC.flatten(2))
        return mixed

    def _mix(self, q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | Windows | None) -> Tensor:
        if isinstance(mask, Windows):
            return windowed_attention(q_BHTC, k_BGSC, v_BGSC, mask)
        if self.logit_cap is not None:
            return capped_attention(q_BHTC, k_BGSC, v_BGSC, mask, self.logit_cap)
        causal, grouped = mask is None and q_BHTC.shape[2] > 1, self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def fuse(self) -> Tensor:
        """Queries', keys' and values' weights in one matrix."""
        return torch.cat((self.wq.weight, self.wk.weight, self.wv.weight))

    def _project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by one product, the first two turned by their positions; heads before positions."""
        all_BTJC = F.linear(x_BTD, self.fuse()).view(*x_BTD.shape[:2], -1, self.head_dim)
        turned_BTJC, v_BTGC = torch.split(all_BTJC, [self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.normed:
            q_BTHC, k_BTGC = torch.split(turned_BTJC, [self.heads, self.kv_heads], dim=2)
            turned_BTJC = torch.cat((self.q_norm(q_BTHC), self.k_norm(k_BTGC)), dim=2)
        turned_BJTC = rotate(turned_BTJC, *rope).transpose(1, 2)
        q_BHTC, k_BGTC = torch.split(turned_BJTC, [self.heads, self.kv_heads], dim=1)
        return q_BHTC, k_BGTC, v_BTGC.transpose(1, 2)
