"""The JSON schema accepts the shipped configs and refuses what loading refuses."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moelm.config import config_schema, load_config
from moelm.config.load import dump_config
from moelm.config.yaml_text import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_it_is_a_schema_with_descriptions() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    ffn = SCHEMA["$defs"]["MoEFFNConfig"]
    assert ffn["properties"]["top_k"]["description"] == "Experts per token (on average, with expert choice)."
    assert ffn["additionalProperties"] is False


@pytest.mark.parametrize("path", [*CONFIGS.glob("*.yaml"), CONFIGS / "sweeps/base.yaml"], ids=lambda path: path.stem)
def test_the_shipped_configs_follow_it(path: Path) -> None:
    VALIDATOR.validate(parse_yaml(path.read_text(encoding="utf-8")))


def test_a_resolved_config_follows_it() -> None:
    VALIDATOR.validate(parse_yaml(dump_config(load_config(CONFIGS / "demo-moe.yaml"))))


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"dimm": 4}},
        {"train": {"steps": "many"}},
        {"train": {"steps": 0}},
        {"model": {"ffn": {"kind": "sparse"}}},
        {"model": {"ffn": {"kind": "dense", "num_experts": 4}}},
        {"base": 3},
        {"train": {"precision": "fp16"}},
    ],
)
def test_mistakes_are_found(tree: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(tree)


@pytest.mark.parametrize(
    "tree", [{"train": {"precision": "bfloat16"}}, {"init_from": {"run": "a", "checkpoint": 200}}, {"base": "a.yaml"}]
)
def test_what_loading_accepts_is_valid(tree: dict[str, Any]) -> None:
    VALIDATOR.validate(tree)
