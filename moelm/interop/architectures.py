"""Which Hugging Face architecture computes what a config describes, and its config.json.

The way back is `moelm.interop.reading`; names of tensors are `moelm.interop.places`' matter.
"""

from dataclasses import dataclass, field
from typing import Any

from moelm.config import (
    DenseFFNConfig,
    ModelConfig,
    MoEFFNConfig,
    NoisyTopKRouterConfig,
    SigmoidRouterConfig,
    TopKRouterConfig,
)
from moelm.errors import MoelmError

Settings = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of Hugging Face's library, as far as moelm's models go."""

    name: str
    """`model_type`."""
    model_class: str
    ffn: dict[str, str]
    """Its settings of the feed-forward blocks, and our names for them."""
    fixed: Settings = field(default_factory=dict)
    """Settings that have one value in all our models."""
    slides: bool = False
    """Whether it knows a sliding window."""
    block: str = "mlp"
    """Its name for a sparse feed-forward block."""
    matrices: tuple[str, str, str] = ("gate_proj", "down_proj", "up_proj")
    """Its names for an expert's w1, w2 and w3."""
    shared: str | None = None
    """Its name for the shared experts, which every sparse layer then has."""
    shared_gate: bool = False
    """Whether they are weighed by a sigmoid, which zero weights hold at one half."""

    @property
    def sparse(self) -> bool:
        """Whether it has experts."""
        return "num_experts" in self.ffn.values()


TRUNK = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
"""Settings that all of them share, and our names."""

_DENSE = {"intermediate_size": "hidden_dim"}
_MIXTRAL = {"intermediate_size": "hidden_dim", "num_local_experts": "num_experts", "num_experts_per_tok": "top_k"}
_NARROW = {"moe_intermediate_size": "hidden_dim", "num_experts_per_tok": "top_k"}
_QWEN = {**_NARROW, "num_experts": "num_experts", "decoder_sparse_step": "every"}
_GLM = {**_NARROW, "n_routed_experts": "num_experts", "n_shared_experts": "shared_experts"}
_GLM_FIXED = {"attention_bias": False, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}

ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("llama", "LlamaForCausalLM", _DENSE, {"attention_bias": False, "mlp_bias": False}),
        Architecture("mistral", "MistralForCausalLM", _DENSE, slides=True),
        Architecture("qwen3", "Qwen3ForCausalLM", _DENSE, {"attention_bias": False}, slides=True),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            _MIXTRAL,
            slides=True,
            block="block_sparse_moe",
            matrices=("w1", "w2", "w3"),
        ),
        Architecture(
            "qwen3_moe", "Qwen3MoeForCausalLM", _QWEN, {"attention_bias": False, "mlp_only_layers": []}, slides=True
        ),
        Architecture(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _QWEN,
            {"qkv_bias": False, "mlp_only_layers": []},
            slides=True,
            shared="shared_expert",
            shared_gate=True,
        ),
        Architecture(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            _GLM,
            {**_GLM_FIXED, "num_nextn_predict_layers": 0},
            shared="shared_experts",
        ),
    )
}

ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}
"""Our name to theirs."""
WINDOW_BY_LAYER = ("qwen3", "qwen2_moe", "qwen3_moe")
"""Those that say layer by layer whether attention slides."""


def architecture_for(model: ModelConfig) -> Architecture:
    """The architecture that computes the same as a model.

    Raises:
        MoelmError: there is none; the sentence names the setting.
    """
    if model.sandwich_norm:
        raise _inexpressible("model.sandwich_norm", True)
    if model.layers_built < model.num_layers:
        raise _inexpressible("model.unique_layers", model.unique_layers)
    if model.ffn.depth > 1:
        raise _inexpressible("model.ffn.depth", model.ffn.depth)
    if model.attention_logit_cap is not None:
        raise _inexpressible("model.attention_logit_cap", model.attention_logit_cap)
    name = _dense_name(model) if isinstance(model.ffn, DenseFFNConfig) else _sparse_name(model, model.ffn)
    return ARCHITECTURES[name]


def _dense_name(model: ModelConfig) -> str:
    if model.qk_norm:
        return "qwen3"
    return "llama" if model.window is None else "mistral"


def _sparse_name(model: ModelConfig, ffn: MoEFFNConfig) -> str:
    match ffn.router:
        case SigmoidRouterConfig():
            beside = " beside model.ffn.router.kind = sigmoid"
            if model.window is not None:
                raise _inexpressible("model.window", model.window, beside)
            if ffn.every > 1:
                raise _inexpressible("model.ffn.every", ffn.every, beside)
            if ffn.num_experts == 1:
                raise _inexpressible("model.ffn.num_experts", 1, beside)
            return "glm4_moe"
        case TopKRouterConfig() | NoisyTopKRouterConfig():
            if model.qk_norm:
                if ffn.shared_experts:
                    raise _inexpressible("model.ffn.shared_experts", ffn.shared_experts, " beside model.qk_norm = true")
                return "qwen3_moe"
            plain = _normalized(ffn) and not ffn.shared_experts and ffn.every == 1
            return "mixtral" if plain else "qwen2_moe"
    raise _inexpressible("model.ffn.router.kind", ffn.router.kind)


def _inexpressible(setting: str, value: object, beside: str = "") -> MoelmError:
    return MoelmError(
        f"{setting} is {value}{beside}, which no Hugging Face architecture that moelm knows can express; "
        "docs/interop.md says which settings can be exported."
    )


def _normalized(ffn: MoEFFNConfig) -> bool:
    return isinstance(ffn.router, NoisyTopKRouterConfig) or bool(getattr(ffn.router, "normalize", False))


def write_settings(model: ModelConfig) -> Settings:
    """config.json of a model, but for its special tokens and dtype.

    Raises:
        MoelmError: no architecture expresses it.
    """
    architecture, ffn = architecture_for(model), model.ffn
    rope: Settings = {"rope_theta": model.rope_theta, "rope_type": "default"}
    settings: Settings = {"architectures": [architecture.model_class], "model_type": architecture.name}
    settings |= {theirs: getattr(model, ours) for theirs, ours in TRUNK.items()}
    settings |= {"num_key_value_heads": model.kv_heads, "head_dim": model.size_per_head}
    settings |= {"hidden_act": ACTIVATIONS[model.activation], "attention_dropout": 0.0, "use_cache": True}
    settings |= {theirs: getattr(ffn, ours) for theirs, ours in architecture.ffn.items()} | architecture.fixed
    if isinstance(ffn, MoEFFNConfig):
        settings["output_router_logits"] = False
        settings.setdefault("intermediate_size", ffn.dense_hidden_dim)
        if architecture.name != "mixtral":
            settings["norm_topk_prob"] = _normalized(ffn)
        if architecture.name == "qwen2_moe":
            settings["shared_expert_intermediate_size"] = shared_width(ffn)
        if isinstance(ffn.router, SigmoidRouterConfig):
            settings |= {"n_shared_experts": max(1, ffn.shared_experts), "routed_scaling_factor": ffn.router.scale}
            settings["use_qk_norm"] = model.qk_norm
            settings["partial_rotary_factor"] = rope["partial_rotary_factor"] = 1.0
    if architecture.name in WINDOW_BY_LAYER:
        kind = "full_attention" if model.window is None else "sliding_attention"
        settings |= {"use_sliding_window": model.window is not None, "max_window_layers": 0}
        settings["layer_types"] = [kind] * model.num_layers
    if architecture.slides:
        settings["sliding_window"] = model.window
    return settings | {"rope_theta": model.rope_theta, "rope_parameters": rope}


def shared_width(ffn: MoEFFNConfig) -> int:
    """Hidden width of the shared experts in an architecture that must have some: where there are none, one of zeros."""
    return max(1, ffn.shared_experts) * ffn.hidden_dim
