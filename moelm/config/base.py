"""The base class of config sections."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Auto = Literal["auto"]


class Config(BaseModel):
    """A section of settings: unknown keys and wrong types are errors, and values are immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)
