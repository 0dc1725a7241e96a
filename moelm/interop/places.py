"""Where each weight of ours is found in the Hugging Face format, in both directions and to the last bit.

Expert weights are stacked here and stored one by one there, or, in the layout that the library computes in (`fused`),
stacked and with w1 above w3. What one format has and the other has not is zeros, or a factor on another weight.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.errors import MoelmError
from moelm.interop.architectures import Architecture, shared_width
from moelm.model import build_model

Weights = dict[str, Tensor]

_TRUNK = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1": "mlp.gate_proj.weight",
    "ffn.w2": "mlp.down_proj.weight",
    "ffn.w3": "mlp.up_proj.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
}
TRAINING_ONLY = "ffn.router.noise_weight"
"""The scale of a noisy router's noise, which evaluation does not have."""


class Place(NamedTuple):
    """One tensor of theirs, and what it is made of."""

    theirs: str
    shape: tuple[int, ...]
    """Of theirs."""
    ours: tuple[str, ...]
    """Our weights, laid one under another; none stands for zeros."""
    expert: int | None = None
    """Which slice of ours, where we stack and they do not."""
    scale: float = 1.0
    """Factor from ours to theirs."""

    def read(self, weights: Weights) -> Tensor:
        """Theirs, from ours."""
        if not self.ours:
            like = next(iter(weights.values()))
            return torch.zeros(self.shape, dtype=like.dtype)
        parts = [weights[name] if self.expert is None else weights[name][self.expert] for name in self.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        return whole if self.scale == 1 else whole * self.scale

    def write(self, tensor: Tensor, weights: Weights) -> None:
        """Ours, from theirs.

        Raises:
            MoelmError: a tensor that must be zeros is not.
        """
        if not self.ours:
            if tensor.any():
                raise MoelmError(f"{self.theirs} is not zero; moelm's shared experts have no gate.")
            return
        whole = tensor if self.scale == 1 else tensor / self.scale
        parts = [whole] if len(self.ours) == 1 else whole.chunk(len(self.ours), dim=-2)
        for name, part in zip(self.ours, parts, strict=True):
            (weights[name] if self.expert is None else weights[name][self.expert]).copy_(part)


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all our weights by name."""
    return {name: tuple(weight.shape) for name, weight in build_model(model, 0, "meta").state_dict().items()}


def find_places(model: ModelConfig, architecture: Architecture, fused: bool = False) -> list[Place]:
    """All tensors of theirs, layer by layer.

    Args:
        fused: expert weights stacked, w1 above w3, as transformers 5 computes with them.
    """
    found: list[Place] = []
    for name, shape in shapes_of(model).items():
        number, _, inner = name.removeprefix("layers.").partition(".")
        if name in _TRUNK:
            found.append(Place(_TRUNK[name], shape, (name,), scale=_trunk_scale(model, name)))
        elif inner in _LAYER:
            found.append(Place(f"model.layers.{number}.{_LAYER[inner]}", shape, (name,)))
        elif inner == "ffn.router.weight":
            block = f"model.layers.{number}.{'mlp' if fused else architecture.block}"
            found.append(Place(f"{block}.gate.weight", shape, (name,)))
            found += _sparse(model, architecture, block, name.removesuffix("router.weight"), fused)
        else:
            known = inner == TRAINING_ONLY or inner.startswith(("ffn.experts.", "ffn.shared."))
            assert known, f"{name} has no place"
    return found


def _trunk_scale(model: ModelConfig, name: str) -> float:
    """Multipliers go into weights that multiply anyway; a tied head then gives back what the embedding got."""
    if name == "embedding.weight":
        return model.embedding_multiplier
    if name == "norm.weight":
        return model.output_multiplier / (model.embedding_multiplier if model.tie_embeddings else 1.0)
    return 1.0


def _matrices(dim: int, width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Names and shapes of a gated block's weights."""
    return ("w1", (width, dim)), ("w2", (dim, width)), ("w3", (width, dim))


def _sparse(model: ModelConfig, architecture: Architecture, block: str, ours: str, fused: bool) -> Iterator[Place]:
    """Experts, shared experts and their gate of one layer."""
    ffn = model.ffn
    assert isinstance(ffn, MoEFFNConfig)
    experts, dim, hidden = ffn.num_experts, model.dim, ffn.hidden_dim
    if fused:
        yield Place(f"{block}.experts.gate_up_proj", (experts, 2 * hidden, dim), (f"{ours}experts.w1", f"{ours}experts.w3"))
        yield Place(f"{block}.experts.down_proj", (experts, dim, hidden), (f"{ours}experts.w2",))
    else:
        for expert in range(experts):
            for (name, shape), theirs in zip(_matrices(dim, hidden), architecture.matrices, strict=True):
                yield Place(f"{block}.experts.{expert}.{theirs}.weight", shape, (f"{ours}experts.{name}",), expert)
    if architecture.shared is not None:
        names = ("gate_proj", "down_proj", "up_proj")
        for (name, shape), theirs in zip(_matrices(dim, shared_width(ffn)), names, strict=True):
            held = (f"{ours}shared.{name}",) if ffn.shared_experts else ()
            double = 2.0 if architecture.shared_gate and name == "w2" else 1.0
            yield Place(f"{block}.{architecture.shared}.{theirs}.weight", shape, held, scale=double)
    if architecture.shared_gate:
        yield Place(f"{block}.shared_expert_gate.weight", (1, dim), ())
