"""The correspondence between moelm's weights and the tensors of the Hugging Face format, exact in both directions.

moelm stacks the experts of a layer. The Hugging Face format has one tensor per expert or, in the layout that transformers
computes with (`fused`), stacked tensors with w1 above w3. What only one side has becomes a tensor of zeros, or a factor on
another weight.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.errors import MoelmError
from moelm.huggingface.architectures import Architecture, shared_hidden_dim
from moelm.model import build_model

Weights = dict[str, Tensor]
"""moelm's weights by name."""

_BIAS = "ffn.router.bias"
_GLOBAL_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wq.bias": "self_attn.q_proj.bias",
    "attention.wk.bias": "self_attn.k_proj.bias",
    "attention.wv.bias": "self_attn.v_proj.bias",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.wo.bias": "self_attn.o_proj.bias",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1": "mlp.gate_proj.weight",
    "ffn.w2": "mlp.down_proj.weight",
    "ffn.w3": "mlp.up_proj.weight",
    _BIAS: "mlp.gate.e_score_correction_bias",
}
_MAPPED_WITH_ROUTER = ("ffn.router.noise_weight", "ffn.shared_gate.weight")
"""The scale of a noisy router's noise, which only training uses, and the gate of the shared experts."""


class TensorMapping(NamedTuple):
    """One tensor of the Hugging Face format, and the moelm weights that it is made of."""

    hf_name: str
    hf_shape: tuple[int, ...]
    names: tuple[str, ...]
    """moelm's names of the weights, concatenated along the rows; empty for a tensor of zeros."""
    expert: int | None = None
    """The expert, for a tensor that is one slice of moelm's stack."""
    scale: float = 1.0
    """The factor by which the Hugging Face tensor is larger."""

    def to_hf(self, weights: Weights) -> Tensor:
        """The Hugging Face tensor, in the weights' dtype."""
        if not self.names:
            return torch.zeros(self.hf_shape, dtype=next(iter(weights.values())).dtype)
        parts = [weights[name] if self.expert is None else weights[name][self.expert] for name in self.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        return tensor if self.scale == 1 else tensor * self.scale

    def from_hf(self, tensor: Tensor, weights: Weights) -> None:
        """Copy the Hugging Face tensor into moelm's weights.

        Raises:
            MoelmError: a tensor that must be zero is not.
        """
        if not self.names:
            if tensor.any():
                raise MoelmError(f"{self.hf_name} is not zero; by its config.json the model has no shared experts.")
            return
        tensor = tensor if self.scale == 1 else tensor / self.scale
        parts = [tensor] if len(self.names) == 1 else tensor.chunk(len(self.names), dim=-2)
        for name, part in zip(self.names, parts, strict=True):
            (weights[name] if self.expert is None else weights[name][self.expert]).copy_(part)


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by name, biases of routers included."""
    return {name: tuple(weight.shape) for name, weight in build_model(model, 0, "meta").state_dict().items()}


def build_weight_map(model: ModelConfig, architecture: Architecture, fused: bool = False) -> list[TensorMapping]:
    """The mappings of all Hugging Face tensors of a model, layer by layer.

    Args:
        fused: expert weights are stacked, with w1 above w3, as transformers 5 computes with them.
    """
    mappings: list[TensorMapping] = []
    for name, shape in weight_shapes(model).items():
        layer, _, inner = name.removeprefix("layers.").partition(".")
        if name in _GLOBAL_NAMES:
            mappings.append(
                TensorMapping(_GLOBAL_NAMES[name], shape, (name,), scale=_global_scale(model, architecture, name))
            )
        elif inner == _BIAS and not architecture.router_bias:
            continue  # imported softmax routers begin with a bias of zero
        elif inner in _LAYER_NAMES:
            mappings.append(TensorMapping(f"model.layers.{layer}.{_LAYER_NAMES[inner]}", shape, (name,)))
        elif inner == "ffn.router.weight":
            unnamed = fused and architecture.stacked_experts is None
            hf_block = f"model.layers.{layer}.{'mlp' if unnamed else architecture.moe_block}"
            mappings.append(TensorMapping(f"{hf_block}.{architecture.router}.weight", shape, (name,)))
            mappings += _expert_mappings(model, architecture, hf_block, name.removesuffix("router.weight"), fused)
        else:
            known = inner in _MAPPED_WITH_ROUTER or inner.startswith(("ffn.experts.", "ffn.shared."))
            assert known, f"{name} has no Hugging Face tensor"
    return mappings


def _global_scale(model: ModelConfig, architecture: Architecture, name: str) -> float:
    """A multiplier of the model, if config.json cannot express it; a tied head is scaled with the embedding."""
    if architecture.multipliers:
        return 1.0
    if name == "embedding.weight":
        return model.embedding_multiplier
    if name == "norm.weight":
        return model.logit_multiplier / (model.embedding_multiplier if model.tie_embeddings else 1.0)
    return 1.0


def _swiglu_shapes(dim: int, hidden_dim: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Names and shapes of the weights of one gated feed-forward block."""
    return ("w1", (hidden_dim, dim)), ("w2", (dim, hidden_dim)), ("w3", (hidden_dim, dim))


def _expert_mappings(
    model: ModelConfig, architecture: Architecture, hf_block: str, block: str, fused: bool
) -> Iterator[TensorMapping]:
    """The experts, shared experts and gate of the shared experts of one layer.

    Args:
        hf_block: prefix of the Hugging Face names.
        block: prefix of moelm's names.
    """
    ffn = model.ffn
    assert isinstance(ffn, MoEFFNConfig)
    experts, dim, hidden_dim = ffn.num_experts, model.dim, ffn.hidden_dim
    if fused or architecture.stacked_experts is not None:
        hf_w1_w3, hf_w2 = architecture.stacked_experts or ("experts.gate_up_proj", "experts.down_proj")
        w1_w3 = (f"{block}experts.w1", f"{block}experts.w3")
        yield TensorMapping(f"{hf_block}.{hf_w1_w3}", (experts, 2 * hidden_dim, dim), w1_w3)
        yield TensorMapping(f"{hf_block}.{hf_w2}", (experts, dim, hidden_dim), (f"{block}experts.w2",))
    else:
        for expert in range(experts):
            for (weight, shape), hf_weight in zip(
                _swiglu_shapes(dim, hidden_dim), architecture.expert_weights, strict=True
            ):
                hf_name = f"{hf_block}.experts.{expert}.{hf_weight}.weight"
                yield TensorMapping(hf_name, shape, (f"{block}experts.{weight}",), expert)
    if architecture.shared is not None:
        hf_weights = ("gate_proj", "down_proj", "up_proj")
        for (weight, shape), hf_weight in zip(_swiglu_shapes(dim, shared_hidden_dim(ffn)), hf_weights, strict=True):
            names = (f"{block}shared.{weight}",) if ffn.shared_experts else ()
            scale = 2.0 if architecture.shared_gate and not ffn.shared_gate and weight == "w2" else 1.0
            yield TensorMapping(f"{hf_block}.{architecture.shared}.{hf_weight}.weight", shape, names, scale=scale)
    if architecture.shared_gate:
        names = (f"{block}shared_gate.weight",) if ffn.shared_gate else ()
        yield TensorMapping(f"{hf_block}.shared_expert_gate.weight", (1, dim), names)
