"""Settings of rotary embeddings in config.json: newer files have `rope_parameters`, older ones `rope_scaling`."""

from typing import Any

from moelm.config import ModelConfig
from moelm.errors import MoelmError
from moelm.huggingface.hf_settings import HFSettings

_FIELDS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
"""Settings by `rope_type`, and the fields of `model.rope_scaling` that they correspond to."""
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")
_UNSUPPORTED = {"mscale": None, "mscale_all_dim": None, "truncate": True}
"""Settings of `yarn` with the only value that moelm supports."""


def rope_section(hf: HFSettings) -> HFSettings:
    """Settings of the rotary embeddings; newer files have rope_theta in the section, older ones beside it."""
    sections = (hf.get("rope_scaling", dict, {}), hf.get("rope_parameters", dict, {}))
    for section in sections:
        for key, value in section.items():
            if isinstance(value, dict):
                raise MoelmError(f"{hf.origin}: {key} has rotary embeddings of its own; moelm has the same in all layers.")
    return HFSettings({"rope_theta": hf.settings.get("rope_theta"), **sections[0], **sections[1]}, hf.origin)


def from_hf_rope(rope: HFSettings) -> dict[str, Any] | None:
    """The `model.rope_scaling` section; None for unscaled frequencies.

    Raises:
        MoelmError: another scaling, or one of its settings is missing or not supported.
    """
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return None
    if kind not in _FIELDS:
        raise MoelmError(f"{rope.origin}: rope_type is {kind!r}; one of default, {', '.join(_FIELDS)} is expected.")
    for key, supported in _UNSUPPORTED.items():
        if (value := rope.settings.get(key)) is not None and value != supported:
            raise MoelmError(f"{rope.origin}: {key} of the rotary embeddings is {value!r}, which moelm does not support.")
    section: dict[str, Any] = {"kind": kind}
    for hf_key, key in _FIELDS[kind].items():
        value = rope.get(hf_key, int if key == "original_max_seq_len" else float, *([None] if key in _OPTIONAL else []))
        if value is not None:
            section[key] = value
    return section


def to_hf_rope(model: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` section."""
    rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if model.rope_scaling is not None:
        fields = _FIELDS[model.rope_scaling.kind]
        values = {hf_key: getattr(model.rope_scaling, key) for hf_key, key in fields.items()}
        rope |= {"rope_type": model.rope_scaling.kind, **{key: value for key, value in values.items() if value is not None}}
    return rope
