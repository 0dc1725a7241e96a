"""The one-sentence description of a config that failed validation."""

import difflib
import types
import typing
from typing import Any, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

RENAMED = {
    "start": "init_from",
    "contestants": "variants",
    "train.compile": "parallel.compile",
    "train.recompute": "parallel.activation_checkpointing",
}
"""Former names of settings, and their names now."""


def describe_error(error: ValidationError, whole: type[BaseModel]) -> str:
    """The first problem as a sentence; an unknown key gets the nearest known one.

    Args:
        whole: the class that was validated.
    """
    problems = error.errors()
    first = problems[0]
    key, section = _locate(first["loc"], whole)
    # A setting of several types has failed once for each.
    same = [problem for problem in problems if _locate(problem["loc"], whole)[0] == key]
    value = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            parent, _, last = key.rpartition(".")
            if key in RENAMED:
                return f"{key} has been renamed; its name is now {RENAMED[key]}."
            known = sorted(section.model_fields) if section else []
            near = difflib.get_close_matches(last, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{parent or 'the top level'} knows {', '.join(known)}."
            text = f"there is no setting {key}; {hint}"
        case "missing":
            text = f"{key} is missing."
        case "value_error":
            text = f"{key}: {first['ctx']['error']}." if key else f"{first['ctx']['error']}."
        case "union_tag_not_found":
            text = f"{key}.kind is missing; one of {first['ctx'].get('tags', 'dense, moe')} is expected."
            text = text if isinstance(value, dict) else f"{key} is {value!r}; a section of settings is expected."
        case "union_tag_invalid":
            text = f"{key}.kind is {value.get('kind')!r}; expected one of {first['ctx']['expected_tags']}."
        case _:
            text = f"{key} is {value!r}, but it should be {' or '.join(_expected(problem) for problem in same)}."
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
    """The kind of value that would have been accepted."""
    said = problem["msg"].removeprefix("Input ").removeprefix("should be ")
    return _EXPECTED.get(problem["type"], said)


def _locate(loc: tuple[int | str, ...], whole: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of an error, and the section class that its last part belongs to.

    pydantic puts the tag of a discriminated union (`dense`) and the type of a plain one (`int`) into the path; the user did
    not write those.
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
