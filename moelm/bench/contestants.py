"""Who is timed: configs, variations of one setting, and their peers in another library."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from moelm.config import ModelConfig, MoEFFNConfig, RunConfig, TopKRouterConfig, load_config
from moelm.errors import MoelmError
from moelm.hardware import pick_device, pick_precision


class Contestant(NamedTuple):
    """One model of one shape under one set of circumstances."""

    name: str
    config: RunConfig
    """With its precision settled."""
    peer: bool = False
    """Hugging Face's model of the same shape."""
    keeps_memory: bool = True
    """Whether the allocator is told to keep freed memory, as moelm does; peers as their users run them do not."""


def enter(paths: Sequence[Path], settings: Sequence[str], vary: str | None, peers: bool) -> list[Contestant]:
    """One for each config, or for each value of what is varied, and their peers.

    Args:
        settings: `key=value` for all of them.
        vary: `key=value,value,...`.
        peers: also time the library's model: as its users run it on this machine, under moelm's allocator settings, and in
            bfloat16, which its users choose everywhere, where the config's precision is another.

    Raises:
        MoelmError: a bad config or variation, peers that are not installed, or a config that they cannot express.
    """
    if peers and find_spec("transformers") is None:
        raise MoelmError("--peers needs the library transformers, which is not installed; moelm's extra `bench` brings it.")
    entries = [
        Contestant(f"{config.name}{label}", config)
        for path in paths
        for label, setting in _variations(vary)
        for config in [_settled(load_config(path, [*settings, *setting]))]
    ]
    return entries + [peer for entry in entries for peer in _peers(entry)] if peers else entries


def _variations(vary: str | None) -> list[tuple[str, list[str]]]:
    if vary is None:
        return [("", [])]
    key, _, values = vary.partition("=")
    if not key or not values:
        raise MoelmError(f"--vary is {vary!r}; a setting and its values are expected, such as seed=0,1,2.")
    return [(f" {key.rpartition('.')[2]}={value}", [f"{key}={value}"]) for value in values.split(",")]


def _settled(config: RunConfig) -> RunConfig:
    if config.train.precision != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": pick_precision(pick_device())})})


def _peers(entry: Contestant) -> list[Contestant]:
    config = entry.config
    own = [name for name, told in _own_settings(config.model).items() if told]
    if own:
        raise MoelmError(f"--peers: {entry.name} sets {', '.join(own)}, which the peers' models do not have; leave it out.")
    kind = "Mixtral" if isinstance(config.model.ffn, MoEFFNConfig) else "Llama"
    found = []
    on_host = pick_device().type == "cpu"
    for precision in dict.fromkeys((config.train.precision, "bf16")):
        wanted = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
        for keeps in (False, True) if on_host else (True,):
            found.append(Contestant(f"{kind} for {entry.name}", wanted, peer=True, keeps_memory=keeps))
    return found


def _own_settings(model: ModelConfig) -> dict[str, bool]:
    """Whether a setting asks for what Mixtral and Llama do not have."""
    ffn = model.ffn
    told = {
        "qk_norm": model.qk_norm,
        "sandwich_norm": model.sandwich_norm,
        "activation": model.activation != "silu",
        "attention_logit_cap": model.attention_logit_cap is not None,
        "embedding_multiplier": model.embedding_multiplier != 1,
        "output_multiplier": model.output_multiplier != 1,
    }
    if not isinstance(ffn, MoEFFNConfig):
        return told | {"window": model.window is not None}
    return told | {
        "ffn.router": ffn.router != TopKRouterConfig(),
        "ffn.shared_experts": ffn.shared_experts > 0,
        "ffn.every": ffn.every > 1,
        "ffn.capacity_factor": ffn.capacity_factor is not None,
    }
