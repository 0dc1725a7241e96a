"""Who is timed: configs, variations of one setting, and their peers in another library."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig, load_config
from moelm.errors import MoelmError
from moelm.hardware import pick_device, pick_precision
from moelm.interop.architectures import Architecture, architecture_for


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
        for config in [settle(load_config(path, [*settings, *setting]))]
    ]
    return entries + [peer for entry in entries for peer in _peers(entry)] if peers else entries


def _variations(vary: str | None) -> list[tuple[str, list[str]]]:
    if vary is None:
        return [("", [])]
    key, _, values = vary.partition("=")
    if not key or not values:
        raise MoelmError(f"--vary is {vary!r}; a setting and its values are expected, such as seed=0,1,2.")
    return [(f" {key.rpartition('.')[2]}={value}", [f"{key}={value}"]) for value in values.split(",")]


def settle(config: RunConfig) -> RunConfig:
    """A config with the precision that it would be trained in here."""
    if config.train.precision != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": pick_precision(pick_device())})})


def _peers(entry: Contestant) -> list[Contestant]:
    config = entry.config
    kind = _peer_of(entry).model_class.removesuffix("ForCausalLM")
    found = []
    on_host = pick_device().type == "cpu"
    for precision in dict.fromkeys((config.train.precision, "bf16")):
        wanted = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
        for keeps in (False, True) if on_host else (True,):
            found.append(Contestant(f"{kind} for {entry.name}", wanted, peer=True, keeps_memory=keeps))
    return found


def _peer_of(entry: Contestant) -> Architecture:
    """The library's architecture that does the same work in a training step."""
    ffn = entry.config.model.ffn
    try:
        architecture = architecture_for(entry.config.model)
    except MoelmError as error:
        raise MoelmError(f"--peers: {entry.name}: {error}") from None
    if isinstance(ffn, MoEFFNConfig):
        own = {
            "ffn.capacity_factor": ffn.capacity_factor is not None,
            "ffn.router.kind = noisy_topk": ffn.router.kind == "noisy_topk",
            "no ffn.shared_experts": architecture.shared is not None and not ffn.shared_experts,
        }
        if names := [name for name, told in own.items() if told]:
            raise MoelmError(
                f"--peers: {entry.name} has {', '.join(names)}, for which {architecture.model_class} does other work."
            )
    return architecture
