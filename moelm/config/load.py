"""From YAML files and `key=value` words to a checked `RunConfig`; every refusal is one sentence."""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moelm.config.base import Config
from moelm.config.schema import RunConfig
from moelm.errors import MoelmError

Tree = dict[str, Any]
Section = typing.TypeVar("Section", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as text; people who write learning rates mean a number. And of two equal keys it takes the last
    without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise yaml.constructor.ConstructorError(problem=f"{key} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a config file, follow its `base:`, apply `key.sub=value` words and check the result.

    Raises:
        MoelmError: a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    tree = read_tree(path)
    override(tree, overrides)
    return check_config(tree, str(path))


def read_tree(path: str | Path) -> Tree:
    """The mapping in a config file, with what it inherits, not checked yet.

    Raises:
        MoelmError: a missing or malformed file.
    """
    return _read_tree(Path(path), seen=())


def override(tree: Tree, words: typing.Sequence[str]) -> None:
    """Lay `key.sub=value` words over a mapping.

    Raises:
        MoelmError: a word that is none.
    """
    # A `kind` goes first: choosing another kind drops the keys of the old one, never the new ones.
    for word in sorted(words, key=lambda word: not word.partition("=")[0].endswith("kind")):
        _override(tree, word)


def check_config(tree: Tree, origin: str) -> RunConfig:
    """Validate a mapping as a run; `origin` opens the error sentence."""
    return check_section(RunConfig, tree, origin)


def check_section(kind: type[Section], tree: Tree, origin: str) -> Section:
    """Validate a mapping as a section of settings; `origin` opens the error sentence.

    Raises:
        MoelmError: an unknown key, a wrong type or a value out of range.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise MoelmError(f"{origin}: {_sentence(error, kind)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved run as YAML, with every default written out."""
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
    """Lay one mapping over another; a section of another `kind` replaces the old one whole."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
    return merged


def _override(tree: Tree, word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise MoelmError(f"{word!r} is not an override; key.sub=value is expected.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise MoelmError(f"{word!r}: {text!r} is not a YAML value.") from None
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        node = _child(node, part, word)
    if isinstance(node, list):
        node[_index(node, last, word)] = value
        return
    if last == "kind" and node.get("kind") not in (None, value):
        node.clear()
    node[last] = value


def _child(node: Any, part: str, word: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, word)]
    else:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
    if not isinstance(child, dict | list):
        raise MoelmError(f"{word!r}: {part} holds a single value and has no keys below it.")
    return child


def _index(items: list[Any], part: str, word: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise MoelmError(f"{word!r}: {part!r} is not an item of a list of {len(items)}, counted from 0.")
    return int(part)


def _sentence(error: ValidationError, whole: type[BaseModel]) -> str:
    """The first problem as a sentence, with the nearest known key for a misspelt one."""
    problems = error.errors()
    first = problems[0]
    place, section = _locate(first["loc"], whole)
    # A setting of several types has failed once for each.
    same = [problem for problem in problems if _locate(problem["loc"], whole)[0] == place]
    value = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            parent, _, key = place.rpartition(".")
            known = sorted(section.model_fields) if section else []
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{parent or 'the top level'} knows {', '.join(known)}."
            text = f"there is no setting {place}; {hint}"
        case "missing":
            text = f"{place} is missing."
        case "value_error":
            text = f"{place}: {first['ctx']['error']}." if place else f"{first['ctx']['error']}."
        case "union_tag_not_found":
            text = f"{place}.kind is missing; one of {first['ctx'].get('tags', 'dense, moe')} is expected."
            text = text if isinstance(value, dict) else f"{place} is {value!r}; a section of settings is expected."
        case "union_tag_invalid":
            text = f"{place}.kind is {value.get('kind')!r}; expected one of {first['ctx']['expected_tags']}."
        case _:
            text = f"{place} is {value!r}, but it should be {' or '.join(_expected(problem) for problem in same)}."
    more = len(problems) - len(same)
    return text if not more else f"{text} ({more} more problem{'s' * (more > 1)} after this one.)"


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section of settings",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, opening with a letter or digit",
}


def _expected(problem: ErrorDetails) -> str:
    """What one kind of value would have been accepted."""
    said = problem["msg"].removeprefix("Input ").removeprefix("should be ")
    return _EXPECTED.get(problem["type"], said)


def _locate(loc: tuple[int | str, ...], whole: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of an error, and the section in which its last part was looked up.

    pydantic puts the tag of a union (`dense`) and the type of a plain one (`int`) into the path; a user never wrote those.
    """
    section: type[BaseModel] | None = whole
    annotation: Any = whole
    parts: list[str] = []
    for part in loc:
        if isinstance(part, int):
            annotation = typing.get_args(annotation)[0]
            parts.append(str(part))
            continue
        members = [arm for arm in _arms(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)]
        tagged = [arm for arm in members if len(members) > 1 and _tag(arm) == part]
        if tagged:
            annotation = tagged[0]
        elif members:
            section = members[0]
            parts.append(part)
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
    return ".".join(parts), section


def _arms(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _tag(section: type[BaseModel]) -> Any:
    kind = section.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind else None
