"""The JSON schema of config files, with which editors complete and check them."""

from typing import Any

from moelm.config.run import RunConfig


def config_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a config file.

    Nothing is required in it, because a file with a `base`, and a base itself, have a part of the settings.
    """
    schema = RunConfig.model_json_schema(mode="validation")
    _relax(schema)
    base = {"type": "string", "description": "Another config file, whose settings this file adds to and replaces."}
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _relax(node: Any) -> None:
    """Drop `required`, and let a section be one of several kinds before it says which."""
    if isinstance(node, list):
        for each in node:
            _relax(each)
    elif isinstance(node, dict):
        if isinstance(node.get("required"), list):
            del node["required"]
        if isinstance(node.get("oneOf"), list):
            node.pop("discriminator", None)
            node["anyOf"] = node.pop("oneOf")
        for each in node.values():
            _relax(each)
