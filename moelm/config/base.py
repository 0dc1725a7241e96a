"""What all sections of a config have in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Auto = Literal["auto"]


class Config(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)
