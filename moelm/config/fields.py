"""The fields of config sections: their types by dotted key."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Union

from pydantic import BaseModel


def arms(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; without what `Annotated` adds to it."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from arms(typing.get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for arm in typing.get_args(annotation):
            yield from arms(arm)
    else:
        yield annotation


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The config sections among the members of a union."""
    return [arm for arm in arms(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)]


def is_text(whole: type[BaseModel], key: str) -> bool:
    """Whether a setting takes any text and nothing else; false for an unknown one.

    Args:
        whole: the class that `key` starts from.
        key: dotted, with the indices of list items.
    """
    found: list[Any] = [whole]
    for part in key.split("."):
        listed = [typing.get_args(annotation)[0] for annotation in found if typing.get_origin(annotation) is list]
        own = [section.model_fields.get(part) for annotation in found for section in sections(annotation)]
        below = listed if part.isdecimal() else [field.annotation for field in own if field is not None]
        found = [arm for annotation in below for arm in arms(annotation)]
    return {arm for arm in found if arm is not type(None)} == {str}
