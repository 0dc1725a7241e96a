"""Loading of parameters in Grok-1's released layout into moelm's model."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model import Transformer, build_model

HEAD_DIM = 8
"""Width of one attention head, which no array's shape determines."""
BLOCK = {
    "rms_norm.scale": "attention_norm.weight",
    "rms_norm_1.scale": "attention_out_norm.weight",
    "rms_norm_2.scale": "ffn_norm.weight",
    "rms_norm_3.scale": "ffn_out_norm.weight",
    "multi_head_attention/query.w": "attention.wq.weight",
    "multi_head_attention/key.w": "attention.wk.weight",
    "multi_head_attention/value.w": "attention.wv.weight",
    "multi_head_attention/linear.w": "attention.wo.weight",
    "router.w": "ffn.router.weight",
    "moe/linear.w": "ffn.experts.w1",
    "moe/linear_1.w": "ffn.experts.w2",
    "moe/linear_v.w": "ffn.experts.w3",
}


def load_grok1_reference(path: str | Path, head_dim: int = HEAD_DIM) -> tuple[Transformer, Tensor, Tensor]:
    """The model, the tokens `(B, T)` and the logits `(B, T, V)` that the released definition gives for them.

    Args:
        path: an .npz of arrays named by module path and parameter, matrices stored (in, out).
        head_dim: width of one attention head.
    """
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    tokens, logits = arrays.pop("tokens").long(), arrays.pop("logits")
    state = {}
    for name, array in arrays.items():
        state[_parameter_name(name)] = array.transpose(-1, -2).contiguous() if name.endswith(".w") else array
    model = build_model(_infer_config(state, head_dim), seed=0)
    model.load_state_dict(state)
    return model.eval(), tokens, logits


def _parameter_name(name: str) -> str:
    match name.split("/", 2):
        case ["language_model", "in_out_embed.embeddings"]:
            return "embedding.weight"
        case ["language_model", "rms_norm.scale"]:
            return "norm.weight"
        case ["transformer", layer, rest]:
            return f"layers.{layer.rpartition('_')[2]}.{BLOCK[rest]}"
        case _:
            raise KeyError(name)


def _infer_config(state: dict[str, Tensor], head_dim: int) -> ModelConfig:
    vocab_size, dim = state["embedding.weight"].shape
    experts, hidden_dim, _ = state["layers.0.ffn.experts.w1"].shape
    return ModelConfig.model_validate(
        {
            "dim": dim,
            "num_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
            "num_heads": state["layers.0.attention.wq.weight"].shape[0] // head_dim,
            "num_kv_heads": state["layers.0.attention.wk.weight"].shape[0] // head_dim,
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "sandwich_norm": True,
            "activation": "gelu",
            "attention_logit_cap": 30.0,
            "embedding_multiplier": math.sqrt(dim),
            "output_multiplier": 1 / math.sqrt(3),
            "ffn": {
                "kind": "moe",
                "hidden_dim": hidden_dim,
                "num_experts": experts,
                "top_k": 2,
                "router": {"kind": "topk", "normalize": False},
            },
        }
    )
