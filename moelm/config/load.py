"""Loading a `RunConfig` from YAML files and `key=value` overrides."""

import os
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moelm.config.base import Config
from moelm.config.errors import describe_error
from moelm.config.ffn import TopKRouterConfig
from moelm.config.fields import is_text
from moelm.config.run import MUON_SETTINGS, RunConfig, TokenizerConfig
from moelm.config.yaml_text import InvalidYaml, dump_yaml, has_comment, parse_yaml
from moelm.errors import MoelmError

Tree = dict[str, Any]
Section = typing.TypeVar("Section", bound=Config)

MAX_FILE_BYTES = 2**20
"""A larger file is not a config."""
DEFAULT_KINDS = {"router": TopKRouterConfig().kind, "tokenizer": TokenizerConfig().kind}
"""The kinds of sections that name none, by the section's key."""


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a config file, follow its `base:`, apply `key.sub=value` overrides and validate the result.

    Raises:
        MoelmError: a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    return check_config(tree, str(path))


def read_tree(path: str | Path) -> Tree:
    """The mapping in a config file merged over its `base:`, not yet validated.

    Raises:
        MoelmError: a missing or malformed file.
    """
    return _read_tree(Path(path), seen=())


def apply_overrides(tree: Tree, overrides: typing.Sequence[str]) -> None:
    """Apply `key.sub=value` overrides to a mapping in place.

    The value of a setting that is text is taken as it is written, except that `null` stands for the default, and that
    quotes around the whole are removed as in YAML. Every other value is YAML.

    Raises:
        MoelmError: an argument of another form.
    """
    # A `kind` is applied first: a new kind drops the keys of the old one, never those of the overrides.
    for argument in sorted(overrides, key=lambda argument: not argument.partition("=")[0].endswith("kind")):
        _apply_override(tree, argument)


def format_override(key: str, value: Any) -> str:
    """The override that gives a setting this value."""
    return f"{key}={dump_yaml(value, in_one_line=True)}"


def refuse_overrides(
    overrides: typing.Sequence[str],
    allowed: typing.Sequence[str],
    fixed: typing.Sequence[str] = ("name", "init_from", "model"),
) -> None:
    """Refuse overrides of settings that existing weights determine.

    Args:
        allowed: settings below `fixed` that may be chosen.
        fixed: sections that may not.

    Raises:
        MoelmError: an override of a fixed setting.
    """

    def below(key: str, section: str) -> bool:
        return f"{key}.".startswith(f"{section}.")

    for argument in overrides:
        key = argument.partition("=")[0]
        if any(below(key, section) for section in fixed) and not any(below(key, section) for section in allowed):
            raise MoelmError(
                f"{argument!r} cannot be chosen, because the weights determine it; of the model's settings, "
                f"{', '.join(allowed)} can be."
            )


def check_config(tree: Tree, origin: str) -> RunConfig:
    """Validate a mapping as a run config; `origin` starts the error sentence."""
    return check_section(RunConfig, tree, origin)


def check_section(kind: type[Section], tree: Tree, origin: str) -> Section:
    """Validate a mapping as a config section; `origin` starts the error sentence.

    Raises:
        MoelmError: an unknown key, a wrong type or a value out of range.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise MoelmError(f"{origin}: {describe_error(error, kind)}") from None


def dump_config(config: RunConfig) -> str:
    """A resolved config as YAML, with every default written out."""
    return dump_yaml(config.model_dump(mode="json", exclude_none=True))


def _read_tree(path: Path, seen: tuple[str, ...]) -> Tree:
    try:
        real = os.path.realpath(path)
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise MoelmError(f"There is no config file {path}.") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise MoelmError(f"{str(path)!r} is not the name of a file.") from None
    if real in seen:
        raise MoelmError(f"{path}: `base:` leads back to this file.")
    tree = _parse_tree(path, content)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise MoelmError(f"{path}: base is {base!r}; the name of another YAML file is expected.")
    return _merge(_read_tree(Path(real).parent / os.path.expanduser(base), (*seen, real)), tree)


def _parse_tree(path: Path, content: bytes) -> Tree:
    if len(content) > MAX_FILE_BYTES:
        raise MoelmError(f"{path} has more than {MAX_FILE_BYTES:,} bytes; a YAML config is expected.")
    try:
        tree = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise MoelmError(f"{path} is not text in UTF-8; a YAML config is expected.") from None
    except InvalidYaml as error:
        raise MoelmError(f"{path} is not valid YAML{error.where}: {error}.") from None
    if not isinstance(tree, dict):
        raise MoelmError(f"{path} holds no settings; a YAML mapping is expected.")
    return tree


def _merge(below: Tree, above: Tree, section: str = "") -> Tree:
    """Merge `above` over `below`, which are sections of this name; another `kind` drops the old kind's settings."""
    kind = below.get("kind", DEFAULT_KINDS.get(section))
    if kind is not None and above.get("kind", kind) != kind:
        below = _without_kind(below, section)
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        merged[key] = _merge(old, value, key) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(tree: Tree, argument: str) -> None:
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise MoelmError(f"{argument!r} is not an override; key.sub=value is expected.")
    if key == "base":
        raise MoelmError(f"{argument!r}: only a file has a base; give the other file instead.")
    value = _override_value(argument, key, text)
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = _child(node, part, argument)
    if isinstance(node, list):
        node[_index(node, last, argument)] = value
        return
    section = path[-1] if path else ""
    if last == "kind" and node.get("kind", DEFAULT_KINDS.get(section)) not in (None, value):
        common = _without_kind(node, section)
        node.clear()
        node.update(common)
    node[last] = value


def _without_kind(node: Tree, section: str) -> Tree:
    """The settings of a section that do not depend on its kind: most of `optim`, and none of other sections."""
    return {key: value for key, value in node.items() if section == "optim" and key not in ("kind", *MUON_SETTINGS)}


def _override_value(argument: str, key: str, text: str) -> Any:
    if not text:
        raise MoelmError(f"{argument!r} has no value; {key}=null stands for the default.")
    takes_text = is_text(RunConfig, key)
    if takes_text and text[0] not in "'\"":
        return None if text == "null" else text
    try:
        value, commented = parse_yaml(text), has_comment(text)
    except InvalidYaml as error:
        if takes_text:
            return text
        raise MoelmError(f"{argument!r}: {text!r} is not a YAML value: {error}.") from None
    if takes_text:
        return value if isinstance(value, str) and not commented else text
    if commented:
        raise MoelmError(f"{argument!r}: a # after a space starts a comment in YAML; quotes around the text prevent that.")
    return value


def _child(node: Any, part: str, argument: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, argument)]
    else:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
    if not isinstance(child, dict | list):
        raise MoelmError(f"{argument!r}: {part} holds a single value and has no keys below it.")
    return child


def _index(items: list[Any], part: str, argument: str) -> int:
    if not (part.isascii() and part.isdecimal()) or len(part) > 9 or int(part) >= len(items):
        raise MoelmError(f"{argument!r}: {part!r} is not an item of a list of {len(items)}, counted from 0.")
    return int(part)
