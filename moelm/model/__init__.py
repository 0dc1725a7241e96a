"""The model: attention, feed-forward, routing and experts, and their counts. Nothing here knows about data or training."""

from moelm.model.attention import KVCache
from moelm.model.counting import FlopCount, ParameterCount, count_flops, count_parameters
from moelm.model.router import Routing
from moelm.model.transformer import ModelOutput, Transformer, build_model

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
