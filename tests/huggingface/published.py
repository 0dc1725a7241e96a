"""Settings of published models, as their config.json has them, but for ids of tokens and what does not change the model."""

from typing import Any

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _settings(model_type: str, shape: tuple[int, ...], **settings: Any) -> dict[str, Any]:
    """Settings with the shape as (vocabulary, width, hidden units, layers, heads, key/value heads, context)."""
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    return {"model_type": model_type, "hidden_act": "silu", **dict(zip(keys, shape, strict=True)), **settings}


def _llama(shape: tuple[int, ...], eps: float = 1e-5, **settings: Any) -> dict[str, Any]:
    return _settings("llama", shape, rms_norm_eps=eps, attention_bias=False, **settings)


def _qwen(model_type: str, shape: tuple[int, ...], **settings: Any) -> dict[str, Any]:
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False, "tie_word_embeddings": False}
    return _settings(model_type, shape, **{**defaults, **settings})


_QWEN2_MOE = {"decoder_sparse_step": 1, "norm_topk_prob": False}
_QWEN3_MOE = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "rope_scaling": None,
    "sliding_window": None,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "head_dim": 128,
}
_GRANITE = {
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
_GLM = {
    "attention_bias": True,
    "head_dim": 128,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "topk_group": 1,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _llama((32000, 4096, 11008, 32, 32, 32, 4096), rope_scaling=None, tie_word_embeddings=False),
    "TinyLlama-1.1B": _llama((32000, 2048, 5632, 22, 32, 4, 2048), rope_scaling=None, tie_word_embeddings=False),
    "Llama-3-8B": _llama((128256, 4096, 14336, 32, 32, 8, 8192), rope_theta=5e5, rope_scaling=None),
    "Llama-3.1-8B": _llama((128256, 4096, 14336, 32, 32, 8, 131072), rope_theta=5e5, rope_scaling=LLAMA3, mlp_bias=False),
    "Llama-3.2-1B": _llama(
        (128256, 2048, 8192, 16, 32, 8, 131072),
        rope_theta=5e5,
        rope_scaling={**LLAMA3, "factor": 32.0},
        head_dim=64,
        mlp_bias=False,
        tie_word_embeddings=True,
    ),
    "SmolLM2-135M": _llama((49152, 576, 1536, 30, 9, 3, 8192), rope_theta=100000, tie_word_embeddings=True),
    "Mistral-7B-v0.1": _settings(
        "mistral", (32000, 4096, 14336, 32, 32, 8, 32768), rms_norm_eps=1e-5, rope_theta=1e4, sliding_window=4096
    ),
    "Mistral-7B-v0.3": _settings(
        "mistral", (32768, 4096, 14336, 32, 32, 8, 32768), rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None
    ),
    "Mixtral-8x7B": _settings(
        "mixtral",
        (32000, 4096, 14336, 32, 32, 8, 32768),
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "Qwen2.5-0.5B": _qwen("qwen2", (151936, 896, 4864, 24, 14, 2, 32768), sliding_window=32768, tie_word_embeddings=True),
    "Qwen2.5-7B": _qwen("qwen2", (152064, 3584, 18944, 28, 28, 4, 131072), sliding_window=131072),
    "Qwen3-0.6B": _qwen(
        "qwen3", (151936, 1024, 3072, 28, 16, 8, 40960), head_dim=128, attention_bias=False, tie_word_embeddings=True
    ),
    "Qwen1.5-MoE-A2.7B": _qwen(
        "qwen2_moe",
        (151936, 2048, 5632, 24, 16, 16, 8192),
        **_QWEN2_MOE,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "Qwen2-57B-A14B": _qwen(
        "qwen2_moe",
        (151936, 3584, 18944, 28, 28, 4, 131072),
        **_QWEN2_MOE,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
    ),
    "Qwen3-30B-A3B": _qwen("qwen3_moe", (151936, 2048, 6144, 48, 32, 4, 40960), **_QWEN3_MOE, moe_intermediate_size=768),
    "Qwen3-235B-A22B": _qwen(
        "qwen3_moe", (151936, 4096, 12288, 94, 64, 4, 40960), **_QWEN3_MOE, moe_intermediate_size=1536
    ),
    "OLMoE-1B-7B": _settings(
        "olmoe",
        (50304, 2048, 1024, 16, 16, 16, 4096),
        attention_bias=False,
        clip_qkv=None,
        norm_topk_prob=False,
        num_experts=64,
        num_experts_per_tok=8,
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "GLM-4.5-Air": _settings(
        "glm4_moe",
        (151552, 4096, 10944, 46, 96, 8, 131072),
        **_GLM,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
    ),
    "GLM-4.5": _settings(
        "glm4_moe",
        (151552, 5120, 12288, 92, 96, 8, 131072),
        **_GLM,
        first_k_dense_replace=3,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
    ),
    "Granite-3.1-2B": _settings(
        "granite",
        (49155, 2048, 8192, 40, 32, 8, 131072),
        **_GRANITE,
        logits_scaling=8.0,
        mlp_bias=False,
        rms_norm_eps=1e-5,
        rope_theta=5e6,
    ),
    "Granite-3.1-3B-A800M": _settings(
        "granitemoe",
        (49155, 1536, 512, 32, 24, 8, 131072),
        **_GRANITE,
        logits_scaling=6.0,
        num_local_experts=40,
        num_experts_per_tok=8,
        rms_norm_eps=1e-6,
        rope_theta=1e7,
    ),
}
"""Models that are imported."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Phi-3.5-MoE": ({"model_type": "phimoe"}, "model_type is 'phimoe'"),
    "DeepSeek-V3": ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
    "gpt-oss-20b": ({"model_type": "gpt_oss"}, "model_type is 'gpt_oss'"),
    "Gemma-2-2B": ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
    "OLMo-2-7B": ({"model_type": "olmo2"}, "model_type is 'olmo2'"),
    "a Llama with other biases": ({**PUBLISHED["Llama-3-8B"], "mlp_bias": True}, "mlp_bias is True"),
    "an OLMoE with clipping": ({**PUBLISHED["OLMoE-1B-7B"], "clip_qkv": 8.0}, "clip_qkv is 8.0"),
    "a Qwen2.5 with mixed windows": (
        {**PUBLISHED["Qwen2.5-7B"], "use_sliding_window": True, "max_window_layers": 14},
        "some layers have a sliding window",
    ),
    "a Llama with dynamic scaling": (
        {**PUBLISHED["Llama-3-8B"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic'",
    ),
    "a Granite without logits": (
        {**PUBLISHED["Granite-3.1-2B"], "logits_scaling": 0},
        "logits_scaling is 0.0; a number above",
    ),
    "a Qwen1.5-MoE with uneven shared experts": (
        {**PUBLISHED["Qwen1.5-MoE-A2.7B"], "shared_expert_intermediate_size": 5000},
        "shared_expert_intermediate_size is 5000; a multiple",
    ),
    "a quantized Mixtral": (
        {**PUBLISHED["Mixtral-8x7B"], "quantization_config": {"quant_method": "awq"}},
        "quantization_config",
    ),
}
"""Models that are not, and what the error names."""


def shrunk(published: dict[str, Any]) -> dict[str, Any]:
    """The settings with small widths, depths and numbers; everything else is as published."""
    settings = dict(published)
    grouped = settings["num_key_value_heads"] < settings["num_attention_heads"]
    dense = settings.get("first_k_dense_replace", 0)
    small = {
        "vocab_size": 263,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": dense + 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if grouped else 4,
        "max_position_embeddings": 64,
        "head_dim": 16,
        "num_experts": 6,
        "num_local_experts": 6,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
        "sliding_window": 5,
    }
    if "shared_expert_intermediate_size" in settings:
        ratio = settings["shared_expert_intermediate_size"] // settings["moe_intermediate_size"]
        settings["shared_expert_intermediate_size"] = 10 * ratio
    settings |= {key: value for key, value in small.items() if settings.get(key) is not None}
    if settings.get("rope_scaling"):
        settings["rope_scaling"] = {**settings["rope_scaling"], "original_max_position_embeddings": 32}
    return settings
