"""The base class of config sections, and the types that their fields share."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Size = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""A dimension or a number of parts."""
Count = Annotated[int, Field(gt=0, le=2**53)]
"""A number of steps or tokens; JSON readers know whole numbers up to 2^53."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch and numpy both take."""


class Config(BaseModel):
    """A section of settings: unknown keys and wrong types are errors, and values are immutable and finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _user_path(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a path")
    return os.path.expanduser(path)


UserPath = Annotated[str, AfterValidator(_user_path)]
"""A path as a user writes it; a `~` at the start is the home directory."""
