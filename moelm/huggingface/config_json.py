"""Hugging Face's config.json and the `model` section of a moelm config, converted in both directions.

The defaults of missing settings differ between architectures and between releases of transformers, so a setting that
changes what a model computes must be present; settings that moelm's model does not support are refused by name.
"""

from typing import Any

from moelm.config import ModelConfig, MoEFFNConfig, SigmoidRouterConfig
from moelm.errors import MoelmError
from moelm.huggingface.architectures import (
    ALWAYS_NORMALIZED,
    ARCHITECTURES,
    Architecture,
    architecture_for,
    gates_normalized,
    shared_hidden_dim,
)
from moelm.huggingface.hf_settings import HFSettings
from moelm.huggingface.rope import from_hf_rope, rope_section, to_hf_rope

SHARED_SETTINGS = {
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
"""Settings of every architecture, and the fields of `model` that they correspond to."""
ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}
"""`model.activation` to `hidden_act`."""
WINDOW_BY_LAYER = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
"""Architectures that set the sliding window for each layer."""

_SHARED_TYPES: dict[str, type] = {"rms_norm_eps": float, "initializer_range": float, "tie_word_embeddings": bool}
"""Types of the shared settings that are not whole numbers."""
_OPTIONAL = {"head_dim", "initializer_range", "tie_word_embeddings"}
"""Shared settings whose default is the same everywhere: hidden size over heads, unset, false."""


def to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, without special tokens and dtype.

    Raises:
        MoelmError: no architecture expresses the model.
    """
    architecture, ffn = architecture_for(model), model.ffn
    rope = to_hf_rope(model)
    settings: dict[str, Any] = {"architectures": [architecture.model_class], "model_type": architecture.model_type}
    settings |= {hf_key: getattr(model, key) for hf_key, key in SHARED_SETTINGS.items()}
    settings |= {"num_key_value_heads": model.kv_heads, "head_dim": model.size_per_head}
    settings |= {"hidden_act": ACTIVATIONS[model.activation], "attention_dropout": 0.0, "use_cache": True}
    settings |= {hf_key: getattr(ffn, key) for hf_key, key in architecture.ffn_settings.items()}
    settings |= architecture.fixed_settings
    if isinstance(ffn, MoEFFNConfig):
        settings["output_router_logits"] = False
        settings.setdefault("intermediate_size", ffn.dense_hidden_dim)
        if architecture.model_type not in ALWAYS_NORMALIZED:
            settings["norm_topk_prob"] = gates_normalized(ffn)
        if architecture.model_type == "qwen2_moe":
            settings["shared_expert_intermediate_size"] = shared_hidden_dim(ffn)
        if isinstance(ffn.router, SigmoidRouterConfig):
            settings |= {"n_shared_experts": max(1, ffn.shared_experts), "routed_scaling_factor": ffn.router.scale}
            settings |= {"use_qk_norm": model.qk_norm, "num_nextn_predict_layers": 0}
            settings["first_k_dense_replace"] = ffn.first_dense
            settings["intermediate_size"] = ffn.first_dense_dim or ffn.dense_hidden_dim
            settings["partial_rotary_factor"] = rope["partial_rotary_factor"] = model.rotary_fraction
    if architecture.bias_setting is not None:
        settings[architecture.bias_setting] = model.qkv_bias
    if architecture.multipliers:
        settings |= {
            "embedding_multiplier": model.embedding_multiplier,
            "attention_multiplier": model.attention_multiplier or model.size_per_head**-0.5,
            "residual_multiplier": model.residual_multiplier,
            "logits_scaling": 1 / model.logit_multiplier,
        }
    if architecture.model_type in WINDOW_BY_LAYER:
        layer_type = "full_attention" if model.window is None else "sliding_attention"
        settings |= {"use_sliding_window": model.window is not None, "max_window_layers": 0}
        settings["layer_types"] = [layer_type] * model.num_layers
    if architecture.sliding_window:
        settings["sliding_window"] = model.window
    return settings | {"rope_theta": model.rope_theta, "rope_parameters": rope}


def from_hf_config(settings: dict[str, Any], origin: str) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that a config.json describes, and the `model` section of a moelm config for it.

    Args:
        settings: the content of config.json.
        origin: start of the error messages.

    Raises:
        MoelmError: a setting is missing, has the wrong type, or is not supported by moelm's model.
    """
    hf = HFSettings(settings, origin)
    model_type = hf.get("model_type", str)
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise MoelmError(f"{origin}: model_type is {model_type!r}; one of {', '.join(ARCHITECTURES)} can be imported.")
    rope = rope_section(hf)
    _check_fixed_settings(architecture, hf)
    model = {key: _shared_setting(hf, model_type, hf_key) for hf_key, key in SHARED_SETTINGS.items()}
    model = {key: value for key, value in model.items() if value is not None}
    # The first Llama files have no rope_theta.
    model["rope_theta"] = rope.get("rope_theta", float, *([10_000.0] if model_type == "llama" else []))
    model["rope_scaling"] = from_hf_rope(rope)
    model["rotary_fraction"] = _rotary_fraction(model_type, hf, rope)
    model["activation"] = _activation(hf)
    model |= _attention(architecture, hf)
    model["window"] = _window(architecture, hf, model["num_layers"])
    model["ffn"] = _ffn(architecture, hf)
    return architecture, model


def _shared_setting(hf: HFSettings, model_type: str, key: str) -> Any:
    optional = key in _OPTIONAL and not (key == "head_dim" and model_type in ("qwen3", "glm4_moe"))
    default: list[Any] = [None] if optional or (model_type, key) == ("llama", "num_key_value_heads") else []
    if key == "tie_word_embeddings":
        default = [False]
    return hf.get(key, _SHARED_TYPES.get(key, int), *default)


def _check_fixed_settings(architecture: Architecture, hf: HFSettings) -> None:
    """Refuse settings with another value than the only one that moelm's model supports."""
    pairs = {key: (hf.settings.get(key), supported) for key, supported in architecture.fixed_settings.items()}
    pairs["quantization_config"] = (hf.settings.get("quantization_config"), None)
    for key, (value, supported) in pairs.items():
        if value is not None and value != supported:
            raise MoelmError(f"{hf.origin}: {key} is {value!r}; moelm's model supports only {supported!r}.")


def _rotary_fraction(model_type: str, hf: HFSettings, rope: HFSettings) -> float:
    fraction = rope.get("partial_rotary_factor", float, hf.get("partial_rotary_factor", float, None))
    if model_type == "glm4_moe":
        return 0.5 if fraction is None else fraction  # the default of transformers
    if fraction not in (None, 1.0):
        raise MoelmError(f"{hf.origin}: partial_rotary_factor is {fraction}; a {model_type} has 1.0.")
    return 1.0


def _attention(architecture: Architecture, hf: HFSettings) -> dict[str, Any]:
    """Norms of queries and keys, biases, and multipliers."""
    model_type, setting = architecture.model_type, architecture.bias_setting
    model: dict[str, Any] = {"qk_norm": model_type in ("qwen3", "qwen3_moe")}
    if model_type == "olmoe":
        model["qk_norm"] = "all_heads"
    elif model_type == "glm4_moe":
        model["qk_norm"] = hf.get("use_qk_norm", bool, False)
    # Without the setting, in all releases: qwen2_moe has biases, the others have none.
    has_biases = setting is None or hf.get(setting, bool, model_type == "qwen2_moe")
    model |= dict.fromkeys(architecture.biases, has_biases)
    if architecture.multipliers:
        model |= {
            key: hf.get(key, float) for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier")
        }
        scaling = hf.get("logits_scaling", float)
        if scaling <= 0:
            raise MoelmError(f"{hf.origin}: logits_scaling is {scaling}; a number above 0 is expected.")
        model["output_multiplier"] = 1 / scaling
    return model


def _activation(hf: HFSettings) -> str:
    hidden_act = hf.get("hidden_act", str, "silu")
    for activation, hf_name in ACTIVATIONS.items():
        if hidden_act == hf_name:
            return activation
    raise MoelmError(f"{hf.origin}: hidden_act is {hidden_act!r}; one of {', '.join(ACTIVATIONS.values())} is expected.")


def _window(architecture: Architecture, hf: HFSettings, num_layers: int) -> int | None:
    if not architecture.sliding_window:
        return None
    if architecture.model_type not in WINDOW_BY_LAYER:
        if architecture.model_type == "mistral" and "sliding_window" not in hf.settings:
            raise MoelmError(f"{hf.origin}: sliding_window is missing; null means no window.")
        window: int | None = hf.get("sliding_window", int, None)
        return window
    if not hf.get("use_sliding_window", bool, False):
        return None
    sliding = _sliding_layers(architecture, hf, num_layers)
    if not any(sliding):
        return None
    if not all(sliding):
        raise MoelmError(f"{hf.origin}: some layers have a sliding window and some do not; moelm has one window for all.")
    return int(hf.get("sliding_window", int))


def _sliding_layers(architecture: Architecture, hf: HFSettings, num_layers: int) -> list[bool]:
    """Which layers have the window: given by layer_types, or those from max_window_layers on; in `qwen3_moe` all."""
    if architecture.model_type == "qwen3_moe":
        return [True]
    layer_types = hf.get("layer_types", list, None)
    if layer_types is not None:
        if len(layer_types) != num_layers:
            raise MoelmError(f"{hf.origin}: layer_types has {len(layer_types)} entries, but there are {num_layers} layers.")
        return [layer_type == "sliding_attention" for layer_type in layer_types]
    if architecture.model_type == "qwen2_moe":  # releases differ in the meaning of max_window_layers there
        raise MoelmError(f"{hf.origin}: layer_types is missing, which use_sliding_window requires.")
    first = hf.settings.get("max_window_layers")
    if not isinstance(first, int):
        raise MoelmError(f"{hf.origin}: max_window_layers is {first!r}; a whole number is expected.")
    return [layer >= first for layer in range(num_layers)]


def _ffn(architecture: Architecture, hf: HFSettings) -> dict[str, Any]:
    if "num_experts" in architecture.ffn_settings and "num_experts" not in hf.settings:
        # Some releases of transformers write num_local_experts instead.
        hf = HFSettings({**hf.settings, "num_experts": hf.settings.get("num_local_experts")}, hf.origin)
    ffn: dict[str, Any] = {key: hf.get(hf_key, int) for hf_key, key in architecture.ffn_settings.items()}
    first_dense = hf.settings.get("first_k_dense_replace") or 0
    if architecture.model_type == "glm4_moe" and first_dense != 0:
        ffn |= {"first_dense": hf.get("first_k_dense_replace", int), "first_dense_dim": hf.get("intermediate_size", int)}
    if not architecture.is_moe:
        return {"kind": "dense", **ffn}
    if architecture.model_type == "qwen2_moe":
        ffn["shared_experts"] = _num_shared_experts(hf, ffn)
        ffn["shared_gate"] = ffn["shared_experts"] > 0
    if architecture.model_type not in ALWAYS_NORMALIZED:
        ffn["router"] = {"kind": "topk", "normalize": hf.get("norm_topk_prob", bool)}
    if architecture.model_type == "glm4_moe":
        ffn["router"] |= {"kind": "sigmoid", "scale": hf.get("routed_scaling_factor", float)}
    return {"kind": "moe", **ffn}


def _num_shared_experts(hf: HFSettings, ffn: dict[str, Any]) -> int:
    """The number of shared experts, from their width.

    If some layers are dense, it comes from the width of those, `(top_k + shared_experts) * hidden_dim`: a model without
    shared experts is exported with one of zeros, so their own width does not distinguish none from one.
    """
    if ffn["every"] > 1:
        return max(0, int(hf.get("intermediate_size", int)) // int(ffn["hidden_dim"]) - int(ffn["top_k"]))
    shared_dim, hidden_dim = int(hf.get("shared_expert_intermediate_size", int)), int(ffn["hidden_dim"])
    if shared_dim % hidden_dim:
        raise MoelmError(
            f"{hf.origin}: shared_expert_intermediate_size is {shared_dim}; a multiple of moe_intermediate_size = "
            f"{hidden_dim} is expected."
        )
    return shared_dim // hidden_dim
