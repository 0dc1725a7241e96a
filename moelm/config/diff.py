"""Settings by dotted name: how two configs differ, and which settings determine a training trajectory."""

from collections.abc import Iterator, Mapping
from typing import Any

from moelm.config.base import Config
from moelm.config.run import RunConfig

NOT_IN_TRAJECTORY = (
    "name",
    "wandb.",
    *(f"parallel.{key}" for key in ("dp_", "ep", "reshard_after_forward", "activation_checkpointing", "timeout_s")),
    *(f"train.{key}" for key in ("eval_every", "checkpoint_every", "keep_checkpoints", "log_every")),
)
"""Prefixes of settings that may change when a run resumes: the trained weights do not depend on them."""


def flatten(config: Config) -> dict[str, Any]:
    """All settings of a section by dotted name, without those that are None; list items by index."""

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict | list):
            yield prefix, node
            return
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(f"{prefix}.{key}" if prefix else str(key), value)

    return dict(walk("", config.model_dump(mode="json", exclude_none=True)))


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two flat mappings, sorted."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def trajectory_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine the training trajectory, by dotted name."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(NOT_IN_TRAJECTORY)}
