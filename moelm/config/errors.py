"""The one-sentence description of a config that failed validation."""

import difflib
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moelm.config.fields import sections

RENAMED = {
    "start": "init_from",
    "contestants": "variants",
    "train.compile": "parallel.compile",
    "train.recompute": "parallel.activation_checkpointing",
}
"""Former names of settings, and their names now."""

SHOWN_CHARACTERS = 80
"""Of a value; the rest is cut."""


def describe_error(error: ValidationError, whole: type[BaseModel]) -> str:
    """The first problem as a sentence; an unknown key, which may be the cause of a missing one, gets the nearest known one.

    Args:
        whole: the class that was validated.
    """
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    key, section = _locate(first["loc"], whole)
    # A setting of several types has failed once for each.
    same = [problem for problem in problems if _locate(problem["loc"], whole)[0] == key]
    value = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            last = str(first["loc"][-1])
            parent = key.removesuffix(last).rstrip(".")
            if key in RENAMED:
                return f"{key} has been renamed; its name is now {RENAMED[key]}."
            if "." in last:
                return f"there is no setting {_shorten(last)!r}; in a file, each part of a dotted name is a section."
            known = sorted(section.model_fields) if section else []
            near = difflib.get_close_matches(last, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{parent or 'the top level'} knows {', '.join(known)}."
            text = f"there is no setting {_shorten(key)}; {hint}"
        case "missing":
            text = f"{key} is missing."
        case "value_error":
            text = f"{key}: {first['ctx']['error']}." if key else f"{first['ctx']['error']}."
        case "union_tag_not_found":
            text = f"{key}.kind is missing; one of {first['ctx'].get('tags', 'dense, moe')} is expected."
            text = text if isinstance(value, dict) else f"{key} is {_show(value)}; a section of settings is expected."
        case "union_tag_invalid":
            text = f"{key}.kind is {_show(value.get('kind'))}; expected one of {first['ctx']['expected_tags']}."
        case _:
            expected = " or ".join(dict.fromkeys(map(_expected, same)))
            text = f"{key} is {_show(value)}, but it should be {expected}."
    more = len(problems) - len(same)
    return text if not more else f"{text} ({more} more problem{'s' * (more > 1)} after this one.)"


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text in UTF-8",
    "list_type": "a list",
    "too_short": "a list with something in it",
    "dict_type": "a section of settings",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, opening with a letter or digit",
    "string_too_long": "at most {max_length} characters long",
}


def _expected(problem: ErrorDetails) -> str:
    """The kind of value that would have been accepted."""
    said = problem["msg"].removeprefix("Input ").removeprefix("should be ")
    return _EXPECTED.get(problem["type"], said).format(**problem.get("ctx", {}))


def _show(value: Any) -> str:
    return "empty (null)" if value is None else _shorten(repr(value))


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


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
            annotation = next(iter(typing.get_args(annotation)), None)
            parts.append(str(part))
            continue
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
            parts.append(part)
            continue
        members = sections(annotation)
        tagged = [arm for arm in members if len(members) > 1 and _tag(arm) == part]
        if tagged:
            annotation = tagged[0]
        elif members:
            section = members[0]
            parts.append(part)
            field = section.model_fields.get(part)
            annotation = field.annotation if field else None
    return ".".join(parts), section


def _tag(section: type[BaseModel]) -> Any:
    kind = section.model_fields.get("kind")
    return typing.get_args(kind.annotation)[0] if kind else None
