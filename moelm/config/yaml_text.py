"""YAML as configs are written in it, read and written.

The scalars are those of YAML 1.2: only `true` and `false` are truth values, and `no`, `007`, `1:30` and `2024-01-01` are
text. Every value is one that JSON has, every key is text, and a document has a limited size.
"""

import re
from typing import Any

import yaml

MAX_NODES = 100_000
"""Values in a document, each alias counted with all it stands for."""
MAX_DEPTH = 50

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""The form of each type of scalar, and its first characters."""


class InvalidYaml(Exception):
    """Text that is not the YAML of a config; the message is a clause.

    Args:
        problem: what is wrong.
        line: where, counted from 1.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(" ".join(problem.split()))
        self.where = "" if line is None else f" at line {line}"
        """The place, as a phrase after the name of the file."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own declaration

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._check(node)
        return node

    def _check(self, root: yaml.Node) -> None:
        """Refuse what a config cannot hold, before it is constructed."""
        found, waiting = 0, [(root, 0)]
        while waiting:
            node, depth = waiting.pop()
            found += 1
            line = node.start_mark.line + 1
            if found > MAX_NODES:
                raise InvalidYaml(f"it stands for more than {MAX_NODES:,} values", line)
            if depth > MAX_DEPTH:
                raise InvalidYaml(f"it is nested more than {MAX_DEPTH} levels deep", line)
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                waiting += [(value, depth + 1) for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                waiting += [(value, depth + 1) for value in node.value]
            self._check_tag(node)

    def _check_tag(self, node: yaml.Node) -> None:
        """Refuse tags that change what a value looks like, except for text."""
        if isinstance(node, yaml.ScalarNode):
            own = self.resolve(yaml.ScalarNode, node.value, (node.style is None, True))  # type: ignore[no-untyped-call]
        else:
            own = self.resolve(type(node), None, True)  # type: ignore[no-untyped-call]
        if node.tag not in (own, "tag:yaml.org,2002:str"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise InvalidYaml(f"the tag {tag} is unknown", node.start_mark.line + 1)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        line = node.start_mark.line + 1
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "with several values"
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise InvalidYaml(f"the key {name} is not text", line)
            if name in seen:
                raise InvalidYaml(f"the key {name} appears twice", line)
            seen.add(name)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as another type."""


for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        InvalidYaml: another document than a config is.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise InvalidYaml("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InvalidYaml(error.problem or str(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        character = getattr(error, "character", None)
        problem = str(error) if character is None else f"the character {chr(character)!r} is not allowed"
        raise InvalidYaml(problem) from None
    except ValueError:
        raise InvalidYaml("it has a number with too many digits") from None


def has_comment(text: str) -> bool:
    """Whether YAML would ignore a part of a text, as it does after a `#`; the text is valid YAML."""
    at = 0
    for token in yaml.scan(text, Loader=_Loader):
        if text[at : token.start_mark.index].strip():
            return True
        at = max(at, token.end_mark.index)
    return bool(text[at:].strip())


def dump_yaml(value: Any, in_one_line: bool = False) -> str:
    """A value as YAML in ASCII, which `parse_yaml` reads as the same value.

    Args:
        in_one_line: whether without line breaks, except those within text.
    """
    if not in_one_line:
        return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
