"""How the frequencies of rotary embeddings are lowered for contexts longer than those of the pretraining."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moelm.config.base import Config, Size


class LinearRopeConfig(Config):
    """All positions divided by a factor (Chen et al. 2023, position interpolation)."""

    kind: Literal["linear"]
    factor: float = Field(ge=1)


class Llama3RopeConfig(Config):
    """Low frequencies divided by a factor, high ones unchanged, and those between interpolated (Llama 3.1, 2024)."""

    kind: Literal["llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    """Frequencies with fewer periods in the original context are divided by `factor`."""
    high_freq_factor: float = Field(gt=0)
    """Frequencies with more periods in the original context are unchanged."""
    original_max_seq_len: Size
    """Context of the pretraining in tokens."""

    @model_validator(mode="after")
    def _in_order(self) -> "Llama3RopeConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor}, which must be below high_freq_factor = {self.high_freq_factor}"
            )
        return self


class YarnRopeConfig(Config):
    """NTK by parts, and larger attention logits (Peng et al. 2023, YaRN)."""

    kind: Literal["yarn"]
    factor: float = Field(ge=1)
    original_max_seq_len: Size
    """Context of the pretraining in tokens."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies with more periods in the original context are unchanged."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies with fewer periods in the original context are divided by `factor`."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Factor on queries and keys (default: 0.1 ln(factor) + 1)."""

    @model_validator(mode="after")
    def _in_order(self) -> "YarnRopeConfig":
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow is {self.beta_slow}, which must be below beta_fast = {self.beta_fast}")
        return self

    @property
    def scale(self) -> float:
        """Factor on queries and keys, with the default resolved (Peng et al. 2023, eq. 22)."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor


RopeScalingConfig = Annotated[LinearRopeConfig | Llama3RopeConfig | YarnRopeConfig, Field(discriminator="kind")]
