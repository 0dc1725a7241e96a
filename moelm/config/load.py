"""Loading a `RunConfig` from YAML files and `key=value` overrides."""

import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moelm.config.base import Config
from moelm.config.errors import describe_error
from moelm.config.run import RunConfig
from moelm.errors import MoelmError

Tree = dict[str, Any]
Section = typing.TypeVar("Section", bound=Config)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `3e-4` as a number (YAML 1.1 reads text) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} appears twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


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

    Raises:
        MoelmError: an argument of another form.
    """
    # A `kind` is applied first: a new kind drops the keys of the old one, never those of the overrides.
    for argument in sorted(overrides, key=lambda argument: not argument.partition("=")[0].endswith("kind")):
        _apply_override(tree, argument)


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
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> Tree:
    path = path.resolve() if seen else path
    if path.resolve() in seen:
        raise MoelmError(f"{path}: `base:` leads back to this file.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise MoelmError(f"There is no config file {path}.") from None
    except OSError as error:
        raise MoelmError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MoelmError(f"{path} is not a text file; a YAML config is expected.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise MoelmError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}.") from None
    if not isinstance(tree, dict):
        raise MoelmError(f"{path} holds no settings; a YAML mapping is expected.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise MoelmError(f"{path}: base is {base!r}; the name of another YAML file is expected.")
    return _merge(_read_tree(path.parent / base, (*seen, path.resolve())), tree)


def _merge(below: Tree, above: Tree) -> Tree:
    """Merge `above` over `below`; a section of another `kind` replaces the old section."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
    return merged


def _apply_override(tree: Tree, argument: str) -> None:
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise MoelmError(f"{argument!r} is not an override; key.sub=value is expected.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise MoelmError(f"{argument!r}: {text!r} is not a YAML value.") from None
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = _child(node, part, argument)
    if isinstance(node, list):
        node[_index(node, last, argument)] = value
        return
    if last == "kind" and node.get("kind") not in (None, value):
        node.clear()
    node[last] = value


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
    if not part.isdigit() or int(part) >= len(items):
        raise MoelmError(f"{argument!r}: {part!r} is not an item of a list of {len(items)}, counted from 0.")
    return int(part)
