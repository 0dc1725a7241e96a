"""The Hugging Face architectures that moelm exchanges weights with, and the choice of one for a model.

The settings of config.json are in `moelm.huggingface.config_json`, the names of tensors in `moelm.huggingface.weight_map`.
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


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of the transformers library; settings and modules are given by their Hugging Face names."""

    model_type: str
    model_class: str
    ffn_settings: dict[str, str]
    """Settings of the feed-forward blocks, and the fields of `model.ffn` that they correspond to."""
    fixed_settings: dict[str, Any] = field(default_factory=dict)
    """Settings that have one value in all moelm models."""
    sliding_window: bool = False
    """Whether attention can have a sliding window."""
    moe_block: str = "mlp"
    """Module name of a sparse feed-forward block."""
    expert_weights: tuple[str, str, str] = ("gate_proj", "down_proj", "up_proj")
    """Names of an expert's w1, w2 and w3."""
    shared: str | None = None
    """Module name of the shared experts, which every sparse layer of the architecture then has."""
    shared_gate: bool = False
    """Whether the shared experts' output is multiplied by a sigmoid gate; gate weights of zero make it one half."""
    router_bias: bool = False
    """Whether routers have a selection bias."""
    router: str = "gate"
    """Module name of the router in a sparse block."""
    stacked_experts: tuple[str, str] | None = None
    """Names of the stacked w1 and w3, and of the stacked w2, if they are stored like that."""
    biases: tuple[str, ...] = ()
    """Settings of `model` for the biases of attention, which are all on or all off."""
    bias_setting: str | None = None
    """The setting that turns them on or off; None if they are always on."""
    multipliers: bool = False
    """Whether settings multiply the embedding, the logits, the attention logits and the outputs of blocks."""

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return "num_experts" in self.ffn_settings.values()


_DENSE = {"intermediate_size": "hidden_dim"}
_NO_BIAS = {"mlp_bias": False}
_BIASES = ("qkv_bias", "attention_output_bias")
_MIXTRAL = {"intermediate_size": "hidden_dim", "num_local_experts": "num_experts", "num_experts_per_tok": "top_k"}
_OLMOE = {"intermediate_size": "hidden_dim", "num_experts": "num_experts", "num_experts_per_tok": "top_k"}
_FINE_GRAINED = {"moe_intermediate_size": "hidden_dim", "num_experts_per_tok": "top_k"}
_QWEN_MOE = {**_FINE_GRAINED, "num_experts": "num_experts", "decoder_sparse_step": "every"}
_GLM_MOE = {**_FINE_GRAINED, "n_routed_experts": "num_experts", "n_shared_experts": "shared_experts"}

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", _DENSE, _NO_BIAS, biases=_BIASES, bias_setting="attention_bias"),
        Architecture("mistral", "MistralForCausalLM", _DENSE, sliding_window=True),
        Architecture("qwen2", "Qwen2ForCausalLM", _DENSE, sliding_window=True, biases=("qkv_bias",)),
        Architecture(
            "granite",
            "GraniteForCausalLM",
            _DENSE,
            _NO_BIAS,
            biases=_BIASES,
            bias_setting="attention_bias",
            multipliers=True,
        ),
        Architecture(
            "qwen3", "Qwen3ForCausalLM", _DENSE, sliding_window=True, biases=_BIASES, bias_setting="attention_bias"
        ),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            _MIXTRAL,
            sliding_window=True,
            moe_block="block_sparse_moe",
            expert_weights=("w1", "w2", "w3"),
        ),
        Architecture(
            "granitemoe",
            "GraniteMoeForCausalLM",
            _MIXTRAL,
            moe_block="block_sparse_moe",
            router="router.layer",
            stacked_experts=("input_linear.weight", "output_linear.weight"),
            biases=_BIASES,
            bias_setting="attention_bias",
            multipliers=True,
        ),
        Architecture(
            "olmoe", "OlmoeForCausalLM", _OLMOE, {"clip_qkv": None}, biases=_BIASES, bias_setting="attention_bias"
        ),
        Architecture(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _QWEN_MOE,
            {"mlp_only_layers": []},
            sliding_window=True,
            biases=_BIASES,
            bias_setting="attention_bias",
        ),
        Architecture(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _QWEN_MOE,
            {"mlp_only_layers": []},
            sliding_window=True,
            shared="shared_expert",
            shared_gate=True,
            biases=("qkv_bias",),
            bias_setting="qkv_bias",
        ),
        Architecture(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            _GLM_MOE,
            {"n_group": 1, "topk_group": 1},
            shared="shared_experts",
            router_bias=True,
            biases=("qkv_bias",),
            bias_setting="attention_bias",
        ),
    )
}

ALWAYS_NORMALIZED = ("mixtral", "granitemoe")
"""Architectures whose gates sum to 1 without a setting."""
_QK_NORMS: dict[bool | str, tuple[str, ...]] = {True: ("qwen3", "qwen3_moe", "glm4_moe"), "all_heads": ("olmoe",)}
"""Architectures that can have each form of `model.qk_norm`."""


def architecture_for(model: ModelConfig) -> Architecture:
    """The architecture that computes the same function as a model.

    Raises:
        MoelmError: there is none; the message names the setting.
    """
    if model.num_unique_layers < model.num_layers:
        raise _not_expressible("model.unique_layers", model.unique_layers)
    for config, key in ((model, "sandwich_norm"), (model, "attention_logit_cap"), (model.ffn, "depth")):
        if not _is_default(config, key):
            raise _not_expressible(f"model.{'' if config is model else 'ffn.'}{key}", getattr(config, key))
    model_type = _dense_type(model) if isinstance(model.ffn, DenseFFNConfig) else _moe_type(model, model.ffn)
    _check_expressible(model, model_type)
    return ARCHITECTURES[model_type]


def _check_expressible(model: ModelConfig, model_type: str) -> None:
    """Refuse settings that the architecture does not have."""
    ffn, architecture = model.ffn, ARCHITECTURES[model_type]
    expressible = {
        "window": architecture.sliding_window,
        "qkv_bias": "qkv_bias" in architecture.biases,
        "attention_output_bias": "attention_output_bias" in architecture.biases,
        "qk_norm": model_type in _QK_NORMS.get(model.qk_norm, ()),
        "rotary_fraction": model_type == "glm4_moe",
        "attention_multiplier": architecture.multipliers,
        "residual_multiplier": architecture.multipliers,
    }
    for key, has_it in expressible.items():
        if not (has_it or _is_default(model, key)):
            raise _missing_in(model_type, f"model.{key}", getattr(model, key))
    if len(architecture.biases) > 1 and model.qkv_bias != model.attention_output_bias:
        on, off = _BIASES if model.qkv_bias else reversed(_BIASES)
        raise _missing_in(model_type, f"model.{on}", f"True without model.{off}")
    if not isinstance(ffn, MoEFFNConfig):
        return
    expressible = {
        "every": "every" in architecture.ffn_settings.values(),
        "shared_experts": architecture.shared is not None,
        "shared_gate": architecture.shared_gate,
        "first_dense": model_type == "glm4_moe",
    }
    for key, has_it in expressible.items():
        if not (has_it or _is_default(ffn, key)):
            raise _missing_in(model_type, f"model.ffn.{key}", getattr(ffn, key))
    if ffn.num_experts == 1 and model_type == "glm4_moe":
        raise _missing_in(model_type, "model.ffn.num_experts", 1)
    if not gates_normalized(ffn) and model_type in ALWAYS_NORMALIZED:
        raise _missing_in(model_type, "model.ffn.router.normalize", False)


def _is_default(config: ModelConfig | DenseFFNConfig | MoEFFNConfig, key: str) -> bool:
    """Whether a setting has its default, which all architectures have."""
    return bool(getattr(config, key) == type(config).model_fields[key].default)


def _missing_in(model_type: str, setting: str, value: object) -> MoelmError:
    return MoelmError(
        f"{setting} is {value}, which {model_type} does not have, the architecture of the other settings; "
        "docs/interop.md lists the settings that can be exported."
    )


def gates_normalized(ffn: MoEFFNConfig) -> bool:
    """Whether the gates of a token's experts sum to 1."""
    return isinstance(ffn.router, NoisyTopKRouterConfig) or bool(getattr(ffn.router, "normalize", False))


def shared_hidden_dim(ffn: MoEFFNConfig) -> int:
    """Hidden width of the shared experts in an architecture that always has them; without any, one expert of zeros."""
    return max(1, ffn.shared_experts) * ffn.hidden_dim


def _dense_type(model: ModelConfig) -> str:
    if _has_multipliers(model):
        return "granite"
    if model.qk_norm:
        return "qwen3"
    if model.qkv_bias and not model.attention_output_bias:
        return "qwen2"
    return "llama" if model.window is None else "mistral"


def _moe_type(model: ModelConfig, ffn: MoEFFNConfig) -> str:
    match ffn.router:
        case SigmoidRouterConfig():
            return "glm4_moe"
        case TopKRouterConfig() | NoisyTopKRouterConfig():
            if ffn.balance.bias:
                raise _not_expressible("model.ffn.balance.bias", ffn.balance.bias, " with model.ffn.router.kind = topk")
            if model.qk_norm and not _has_multipliers(model):
                return "olmoe" if model.qk_norm == "all_heads" else "qwen3_moe"
            if _has_multipliers(model) or model.attention_output_bias:
                return "granitemoe"
            is_mixtral = gates_normalized(ffn) and not ffn.shared_experts and ffn.every == 1 and not model.qkv_bias
            return "mixtral" if is_mixtral else "qwen2_moe"
    raise _not_expressible("model.ffn.router.kind", ffn.router.kind)


def _has_multipliers(model: ModelConfig) -> bool:
    return model.attention_multiplier is not None or model.residual_multiplier != 1


def _not_expressible(setting: str, value: object, together_with: str = "") -> MoelmError:
    return MoelmError(
        f"{setting} is {value}{together_with}, which no Hugging Face architecture supported by moelm can express; "
        "docs/interop.md lists the settings that can be exported."
    )
