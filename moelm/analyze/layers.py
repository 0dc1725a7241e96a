"""The sparse layers of a model whose tokens select their experts."""

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.errors import MoelmError


def sparse_ffn(config: ModelConfig) -> MoEFFNConfig:
    """The config of a model's sparse feed-forward blocks.

    Raises:
        MoelmError: a dense model, or expert-choice routing.
    """
    ffn = config.ffn
    if not isinstance(ffn, MoEFFNConfig):
        raise MoelmError("The model is dense and has no routing; a model with model.ffn.kind=moe is expected.")
    if ffn.router.kind == "expert_choice":
        raise MoelmError(
            "The model's experts choose their tokens (router.kind is expert_choice), so tokens have no first expert; "
            "a model with another router is expected."
        )
    return ffn


def layer_number(config: ModelConfig, name: str) -> int:
    """The index of a sparse layer, given as `first`, `middle`, `last` or its index.

    Raises:
        MoelmError: what `sparse_ffn` raises, or there is no such sparse layer.
    """
    sparse_ffn(config)
    layers = config.sparse_layers
    named = {"first": layers[0], "middle": layers[len(layers) // 2], "last": layers[-1]}
    number = named.get(name, int(name) if name.isdecimal() else None)
    if number not in layers:
        raise MoelmError(
            f"There is no sparse layer {name!r}; first, middle, last or one of {', '.join(map(str, layers))} is expected."
        )
    return number
