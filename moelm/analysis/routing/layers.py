"""Which layers of a model have routing to look at, and by which words a person names one."""

from moelm.config import ModelConfig, MoEFFNConfig
from moelm.errors import MoelmError


def sparse_ffn(config: ModelConfig) -> MoEFFNConfig:
    """The mixture of a model whose tokens choose their experts.

    Raises:
        MoelmError: a dense model, or one whose experts choose.
    """
    ffn = config.ffn
    if not isinstance(ffn, MoEFFNConfig):
        raise MoelmError("The model is dense; there is no routing to look at.")
    if ffn.router.kind == "expert_choice":
        raise MoelmError(
            "The model's experts choose their tokens (router.kind is expert_choice); tokens have no first choice."
        )
    return ffn


def layer_number(config: ModelConfig, asked: str) -> int:
    """Number of a sparse layer, from `first`, `middle`, `last` or its number.

    Raises:
        MoelmError: a model without choices of its tokens, or no such layer.
    """
    sparse_ffn(config)
    layers = config.sparse_layers
    named = {"first": layers[0], "middle": layers[len(layers) // 2], "last": layers[-1]}
    found = named.get(asked, int(asked) if asked.isdecimal() else None)
    if found not in layers:
        raise MoelmError(
            f"The layer {asked!r} is none with experts; first, middle, last or one of "
            f"{', '.join(map(str, layers))} is expected."
        )
    return found
