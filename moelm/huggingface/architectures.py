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

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return "num_experts" in self.ffn_settings.values()


_DENSE = {"intermediate_size": "hidden_dim"}
_MIXTRAL = {"intermediate_size": "hidden_dim", "num_local_experts": "num_experts", "num_experts_per_tok": "top_k"}
_FINE_GRAINED = {"moe_intermediate_size": "hidden_dim", "num_experts_per_tok": "top_k"}
_QWEN_MOE = {**_FINE_GRAINED, "num_experts": "num_experts", "decoder_sparse_step": "every"}
_GLM_MOE = {**_FINE_GRAINED, "n_routed_experts": "num_experts", "n_shared_experts": "shared_experts"}

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", _DENSE, {"attention_bias": False, "mlp_bias": False}),
        Architecture("mistral", "MistralForCausalLM", _DENSE, sliding_window=True),
        Architecture("qwen3", "Qwen3ForCausalLM", _DENSE, {"attention_bias": False}, sliding_window=True),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            _MIXTRAL,
            sliding_window=True,
            moe_block="block_sparse_moe",
            expert_weights=("w1", "w2", "w3"),
        ),
        Architecture(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _QWEN_MOE,
            {"attention_bias": False, "mlp_only_layers": []},
            sliding_window=True,
        ),
        Architecture(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _QWEN_MOE,
            {"qkv_bias": False, "mlp_only_layers": []},
            sliding_window=True,
            shared="shared_expert",
            shared_gate=True,
        ),
        Architecture(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            _GLM_MOE,
            {
                "attention_bias": False,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 0,
                "num_nextn_predict_layers": 0,
            },
            shared="shared_experts",
            router_bias=True,
        ),
    )
}


def architecture_for(model: ModelConfig) -> Architecture:
    """The architecture that computes the same function as a model.

    Raises:
        MoelmError: there is none; the message names the setting.
    """
    if model.sandwich_norm:
        raise _not_expressible("model.sandwich_norm", True)
    if model.num_unique_layers < model.num_layers:
        raise _not_expressible("model.unique_layers", model.unique_layers)
    if model.ffn.depth > 1:
        raise _not_expressible("model.ffn.depth", model.ffn.depth)
    if model.attention_logit_cap is not None:
        raise _not_expressible("model.attention_logit_cap", model.attention_logit_cap)
    model_type = _dense_type(model) if isinstance(model.ffn, DenseFFNConfig) else _moe_type(model, model.ffn)
    return ARCHITECTURES[model_type]


def gates_normalized(ffn: MoEFFNConfig) -> bool:
    """Whether the gates of a token's experts sum to 1."""
    return isinstance(ffn.router, NoisyTopKRouterConfig) or bool(getattr(ffn.router, "normalize", False))


def shared_hidden_dim(ffn: MoEFFNConfig) -> int:
    """Hidden width of the shared experts in an architecture that always has them; without any, one expert of zeros."""
    return max(1, ffn.shared_experts) * ffn.hidden_dim


def _dense_type(model: ModelConfig) -> str:
    if model.qk_norm:
        return "qwen3"
    return "llama" if model.window is None else "mistral"


def _moe_type(model: ModelConfig, ffn: MoEFFNConfig) -> str:
    match ffn.router:
        case SigmoidRouterConfig():
            together_with = " with model.ffn.router.kind = sigmoid"
            if model.window is not None:
                raise _not_expressible("model.window", model.window, together_with)
            if ffn.every > 1:
                raise _not_expressible("model.ffn.every", ffn.every, together_with)
            if ffn.num_experts == 1:
                raise _not_expressible("model.ffn.num_experts", 1, together_with)
            return "glm4_moe"
        case TopKRouterConfig() | NoisyTopKRouterConfig():
            if ffn.balance.bias:
                raise _not_expressible("model.ffn.balance.bias", ffn.balance.bias, " with model.ffn.router.kind = topk")
            if model.qk_norm:
                if ffn.shared_experts:
                    raise _not_expressible("model.ffn.shared_experts", ffn.shared_experts, " with model.qk_norm = true")
                return "qwen3_moe"
            is_mixtral = gates_normalized(ffn) and not ffn.shared_experts and ffn.every == 1
            return "mixtral" if is_mixtral else "qwen2_moe"
    raise _not_expressible("model.ffn.router.kind", ffn.router.kind)


def _not_expressible(setting: str, value: object, together_with: str = "") -> MoelmError:
    return MoelmError(
        f"{setting} is {value}{together_with}, which no Hugging Face architecture supported by moelm can express; "
        "docs/interop.md lists the settings that can be exported."
    )
