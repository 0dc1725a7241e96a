"""The model: attention, feed-forward blocks, sparse layers, initialization, and parameter and FLOP counts."""

from moelm.model.flops import FlopCount, ParameterCount, count_flops, count_parameters
from moelm.model.init import build_model
from moelm.model.kv_cache import KVCache
from moelm.model.moe.router import Routing
from moelm.model.transformer import ModelOutput, Transformer

__all__ = [
    "FlopCount",
    "KVCache",
    "ModelOutput",
    "ParameterCount",
    "Routing",
    "Transformer",
    "build_model",
    "count_flops",
    "count_parameters",
]
