"""Mutated configs and overrides: every one is refused with one sentence, or read as what it says."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.config import check_config, describe_ineffective, dump_config, flatten, load_config
from tests.conftest import tiny_config
from tests.mutations import NASTY_VALUES, count_accepted, mutated_files


@pytest.fixture
def read_config(tmp_path: Path) -> Callable[..., None]:
    """A function that loads a config, and loads what it is written as."""
    path, again = tmp_path / "config.yaml", tmp_path / "again.yaml"

    def read(content: bytes, overrides: Sequence[str] = ()) -> None:
        path.write_bytes(content)
        config = load_config(path, overrides)
        again.write_text(dump_config(config), encoding="utf-8")
        reloaded = load_config(again)
        assert reloaded == config
        assert describe_ineffective(reloaded) == describe_ineffective(config)

    return read


def write_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8")


def test_configs(read_config: Callable[..., None]) -> None:
    required = [tiny_config(kind=kind) for kind in ("moe", "dense")]
    complete = [yaml.safe_load(dump_config(check_config(tree, "tiny"))) for tree in required]
    accepted, refused = count_accepted(mutated_files([*required, *complete], 1200, write_yaml), read_config)
    assert accepted > 50
    assert refused > 500


def test_overrides(read_config: Callable[..., None]) -> None:
    tree = tiny_config()
    keys = [*flatten(check_config(tree, "tiny")), "model.ffn", "data", "data.sources", "wandb.project", "", "model..x"]
    rng = random.Random(0)
    texts = [*map(str, NASTY_VALUES), "4", "64", "1e-3", "true"]
    inputs = [[f"{rng.choice(keys)}={rng.choice(texts)}" for _ in range(rng.choice((1, 1, 2)))] for _ in range(800)]
    content = write_yaml(tree)
    accepted, refused = count_accepted(inputs, lambda overrides: read_config(content, overrides))
    assert accepted > 50
    assert refused > 200
