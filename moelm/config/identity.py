"""Settings by their dotted names, and which of them decide what a run learns."""

from collections.abc import Iterator, Mapping
from typing import Any

from moelm.config.base import Config
from moelm.config.schema import RunConfig

FREE = (
    "name",
    "wandb.",
    *(f"parallel.{key}" for key in ("dp_", "ep", "reshard_after_forward", "activation_checkpointing", "timeout_s")),
    *(f"train.{key}" for key in ("eval_every", "checkpoint_every", "keep_checkpoints", "log_every")),
)
"""How settings begin of which a run may go on with another value: nothing it learns depends on them."""


def flatten(config: Config) -> dict[str, Any]:
    """All settings of a section by their dotted names, those that are None left out; items of lists by their number."""

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict | list):
            yield prefix, node
            return
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)

    return dict(walk("", config.model_dump(mode="json", exclude_none=True)))


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The dotted names under which two flat mappings do not hold the same, in order."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the trajectory."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(FREE)}
