"""Small transformers models with random weights, and the tensors of an exported directory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moelm.config import TokenizerConfig
from moelm.data.tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 263,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}
GLM = {
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "head_dim": 6,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 0.4}
FULL_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-tied-window": ("mixtral", {"num_local_experts": 3, "tie_word_embeddings": True, "sliding_window": 5}),
    "mixtral-odd": (
        "mixtral",
        {
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "hidden_size": 18,
            "head_dim": 10,
            "intermediate_size": 31,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        },
    ),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-odd": (
        "llama",
        {"num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 33, "vocab_size": 301},
    ),
    "mistral": ("mistral", {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", SLIDING),
    "qwen3-yarn": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
            },
        },
    ),
    "granite": ("granite", {**GRANITE, "logits_scaling": 0.1}),
    "granitemoe": (
        "granitemoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
    "granitemoe-biases": (
        "granitemoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    ),
    "olmoe-biases": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "attention_bias": True}),
    "olmoe": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-window": ("qwen3", {"head_dim": 6, **SLIDING}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe-biases": ("qwen3_moe", {**QWEN, "norm_topk_prob": True, "attention_bias": True}),
    "qwen3_moe-every-2": ("qwen3_moe", {**QWEN, "decoder_sparse_step": 2, "intermediate_size": 24}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "qkv_bias": False,
        },
    ),
    "qwen2_moe-published": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 48,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {**GLM, **FULL_ROTARY, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "use_qk_norm": True},
    ),
    "glm4_moe-published": (
        "glm4_moe",
        {
            **GLM,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "head_dim": 12,
            "num_nextn_predict_layers": 1,
        },
    ),
    "glm4_moe-bare": ("glm4_moe", {**GLM, **FULL_ROTARY, "norm_topk_prob": False}),
}
"""model_type, and the settings that differ from SHAPE."""


def build_hf_model(case: str) -> Any:
    """The model of one of `CASES`."""
    model_type, changes = CASES[case]
    return random_hf_model(model_type, {**SHAPE, **changes}, case)


def random_hf_model(model_type: str, settings: dict[str, Any], name: str) -> Any:
    """A model whose weights are all random, those of norms and biases included; they depend on the name."""
    torch.manual_seed(sum(map(ord, name)))
    config = transformers.AutoConfig.for_model(model_type, **settings)
    # A loop over the experts: the grouped matrix product of transformers refuses odd sizes.
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor_name.endswith(("norm.weight", "e_score_correction_bias", ".bias")):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def save_hf_model(model: Any, folder: Path, **options: Any) -> Path:
    """Write the model and a byte tokenizer to a directory, and return it."""
    model.save_pretrained(folder, **options)
    build_tokenizer(TokenizerConfig(kind="byte"), ()).save(folder / "tokenizer.json")
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
