"""What is timed: configs, values of one setting, and their peers, Hugging Face's models of the same shapes."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from moelm.config import MoEFFNConfig, RunConfig, load_config
from moelm.errors import MoelmError
from moelm.hardware import pick_device, pick_precision
from moelm.huggingface.architectures import Architecture, architecture_for


class BenchVariant(NamedTuple):
    """One model under one set of conditions."""

    name: str
    config: RunConfig
    """Its precision is resolved."""
    peer: bool = False
    """Whether it is Hugging Face's model."""
    keeps_memory: bool = True
    """Whether the allocator keeps freed memory, as moelm's training does; on a CPU, peers are timed with and without."""
    balanced: bool = False
    """Whether all experts have equal loads, whatever the router selects."""


def list_variants(
    paths: Sequence[Path],
    overrides: Sequence[str],
    vary: str | None,
    peers: bool,
    training: bool = True,
    balanced: bool = False,
) -> list[BenchVariant]:
    """One variant per config and value of the varied setting, followed by those with balanced routing and by their peers.

    Args:
        overrides: `key=value` for all configs.
        vary: `key=value,value,...`.
        peers: whether to add peers: with the default allocator and with moelm's (on a CPU), each in the config's precision
            and in bfloat16.
        training: whether training steps will be timed.
        balanced: whether to add each mixture with equal loads of its experts.

    Raises:
        MoelmError: an invalid config or `vary`, peers without the library, or a config without a peer.
    """
    if peers and find_spec("transformers") is None:
        raise MoelmError(
            "--peers needs the library transformers, which is not installed; moelm's extra `bench` installs it."
        )
    if not paths:
        raise MoelmError(f"There is no config among {' '.join(overrides)!r}; at least one is expected.")
    variants = [
        BenchVariant(f"{config.name}{suffix}", config)
        for path in paths
        for suffix, varied in _varied_overrides(vary)
        for config in [resolve_precision(load_config(path, [*overrides, *varied]))]
    ]
    with_equal_loads = _balanced(variants) if balanced else []
    of_library = [peer for variant in variants for peer in _peers(variant, training)] if peers else []
    return variants + with_equal_loads + of_library


def _balanced(variants: list[BenchVariant]) -> list[BenchVariant]:
    """The mixtures among the variants, with equal loads."""
    mixtures = [variant for variant in variants if isinstance(variant.config.model.ffn, MoEFFNConfig)]
    if not mixtures:
        raise MoelmError(
            "No config has experts, whose loads could be equal; at least one with model.ffn.kind=moe is expected."
        )
    return [variant._replace(name=f"{variant.name} balanced", balanced=True) for variant in mixtures]


def _varied_overrides(vary: str | None) -> list[tuple[str, list[str]]]:
    """The suffix of the name, and the override, for each value."""
    if vary is None:
        return [("", [])]
    key, _, values = vary.partition("=")
    if not key or not values:
        raise MoelmError(f"--vary is {vary!r}; a setting and its values are expected, such as seed=0,1,2.")
    return [(f" {key.rpartition('.')[2]}={value}", [f"{key}={value}"]) for value in values.split(",")]


def resolve_precision(config: RunConfig) -> RunConfig:
    """The config with this machine's precision instead of `auto`."""
    return _with_precision(config, pick_precision(pick_device())) if config.train.precision == "auto" else config


def _with_precision(config: RunConfig, precision: str) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _peers(variant: BenchVariant, training: bool) -> list[BenchVariant]:
    optim = variant.config.optim
    if training and (optim.kind != "adamw" or any(role.lr == 0 for _, role in optim.groups)):
        raise MoelmError(
            f"--peers: {variant.name} has optim.kind={optim.kind} or frozen roles, but of the library's models all "
            "parameters are updated with AdamW; optim.kind=adamw without frozen roles is expected."
        )
    name = f"{_peer_architecture(variant).model_class.removesuffix('ForCausalLM')} for {variant.name}"
    return [
        BenchVariant(name, _with_precision(variant.config, precision), peer=True, keeps_memory=keeps_memory)
        for precision in dict.fromkeys((variant.config.train.precision, "bf16"))
        for keeps_memory in ((False, True) if pick_device().type == "cpu" else (True,))
    ]


def _peer_architecture(variant: BenchVariant) -> Architecture:
    """The architecture whose training step does the same work."""
    ffn = variant.config.model.ffn
    try:
        architecture = architecture_for(variant.config.model)
    except MoelmError as error:
        raise MoelmError(f"--peers: {variant.name}: {error}") from None
    if isinstance(ffn, MoEFFNConfig):
        differences = {
            "ffn.capacity_factor": ffn.capacity_factor is not None,
            "ffn.router.kind = noisy_topk": ffn.router.kind == "noisy_topk",
            "no ffn.shared_experts": architecture.shared is not None and not ffn.shared_experts,
        }
        if names := [name for name, differs in differences.items() if differs]:
            raise MoelmError(
                f"--peers: {variant.name} has {', '.join(names)}, for which {architecture.model_class} does other work."
            )
    return architecture
