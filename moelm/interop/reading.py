"""A Hugging Face config.json as the `model` section of our config.

What the library fills in where a setting is missing differs between architectures and releases, so a setting that decides
what a model computes must be there; what moelm's model does not have is refused by name.
"""

from typing import Any

from moelm.errors import MoelmError
from moelm.interop.architectures import ACTIVATIONS, ARCHITECTURES, TRUNK, WINDOW_BY_LAYER, Architecture, Settings

_KINDS: dict[type, str] = {
    int: "a whole number above 0",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section",
}
_TRUNK_KINDS: dict[str, type] = {"rms_norm_eps": float, "initializer_range": float, "tie_word_embeddings": bool}
"""All others are whole numbers."""
_OPTIONAL = {"head_dim", "initializer_range", "tie_word_embeddings"}
"""Settings of the trunk whose absence means the same everywhere: width over heads, nothing, false."""


class Given:
    """The settings of one file, asked for by name and kind; null counts as absent.

    Args:
        origin: opens the error sentences.
    """

    def __init__(self, settings: Settings, origin: str) -> None:
        self.settings, self.origin = settings, origin

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """A setting.

        Raises:
            MoelmError: it is missing and has no default, or is of another kind.
        """
        value = self.settings.get(key)
        if value is None:
            if default:
                return default[0]
            raise MoelmError(f"{self.origin}: {key} is missing.")
        fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not fits or (kind is int and value < 1):
            raise MoelmError(f"{self.origin}: {key} is {value!r}; {_KINDS[kind]} is expected.")
        return float(value) if kind is float else value

    def refuse(self, key: str, value: object, expected: object) -> MoelmError:
        """The sentence for a setting that moelm's model does not have."""
        return MoelmError(f"{self.origin}: {key} is {value!r}; moelm's model has {expected!r} alone.")


def read_settings(settings: Settings, origin: str) -> tuple[Architecture, Settings]:
    """The architecture that a config.json describes, and the `model` section of our config for it.

    Args:
        origin: opens the error sentence.

    Raises:
        MoelmError: a setting that is missing, of the wrong kind, or that moelm's model does not have.
    """
    given = Given(settings, origin)
    name = given.get("model_type", str)
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise MoelmError(f"{origin}: model_type is {name!r}; one of {', '.join(ARCHITECTURES)} can be imported.")
    rope = _rope(given)
    _check_fixed(architecture, given, rope)
    tree = {ours: _trunk(given, name, theirs) for theirs, ours in TRUNK.items()}
    tree = {key: value for key, value in tree.items() if value is not None}
    tree["rope_theta"] = rope.get("rope_theta", float, *([10_000.0] if name == "llama" else []))  # the first do not name it
    tree["activation"] = _activation(given)
    tree["qk_norm"] = name in ("qwen3", "qwen3_moe") or given.get("use_qk_norm", bool, False)
    tree["window"] = _window(architecture, given, tree["num_layers"])
    tree["ffn"] = _ffn(architecture, given)
    return architecture, tree


def _trunk(given: Given, name: str, key: str) -> Any:
    optional = key in _OPTIONAL and not (key == "head_dim" and name in ("qwen3", "glm4_moe"))
    defaults: list[Any] = [None] if optional or (name, key) == ("llama", "num_key_value_heads") else []
    if key == "tie_word_embeddings":
        defaults = [False]
    return given.get(key, _TRUNK_KINDS.get(key, int), *defaults)


def _rope(given: Given) -> Given:
    """The section on rotary embeddings, where newer files also keep their base."""
    sections = (given.get("rope_scaling", dict, {}), given.get("rope_parameters", dict, {}))
    return Given({"rope_theta": given.settings.get("rope_theta"), **sections[0], **sections[1]}, given.origin)


def _check_fixed(architecture: Architecture, given: Given, rope: Given) -> None:
    """Refuse settings of which moelm's model knows one value alone."""
    wanted = {key: (given.settings.get(key), value) for key, value in architecture.fixed.items()}
    wanted["rope_type"] = (rope.settings.get("rope_type") or rope.settings.get("type"), "default")
    turned = rope.get("partial_rotary_factor", float, given.get("partial_rotary_factor", float, None))
    if turned is None and architecture.name == "glm4_moe":
        turned = 0.5  # what the library takes where nothing is said
    wanted["partial_rotary_factor"] = (turned, 1.0)
    wanted["quantization_config"] = (given.settings.get("quantization_config"), None)
    for key, (found, value) in wanted.items():
        if found is not None and found != value:
            raise given.refuse(key, found, value)


def _activation(given: Given) -> str:
    found = given.get("hidden_act", str, "silu")
    for ours, theirs in ACTIVATIONS.items():
        if found == theirs:
            return ours
    raise MoelmError(f"{given.origin}: hidden_act is {found!r}; one of {', '.join(ACTIVATIONS.values())} is expected.")


def _window(architecture: Architecture, given: Given, num_layers: int) -> int | None:
    if not architecture.slides:
        return None
    if architecture.name not in WINDOW_BY_LAYER:
        if architecture.name == "mistral" and "sliding_window" not in given.settings:
            raise MoelmError(f"{given.origin}: sliding_window is missing; null stands for none.")
        window: int | None = given.get("sliding_window", int, None)
        return window
    if not given.get("use_sliding_window", bool, False):
        return None
    sliding = _sliding_layers(architecture, given, num_layers)
    if not any(sliding):
        return None
    if not all(sliding):
        raise MoelmError(f"{given.origin}: some layers slide and some do not; moelm's window is one for all layers.")
    return int(given.get("sliding_window", int))


def _sliding_layers(architecture: Architecture, given: Given, num_layers: int) -> list[bool]:
    """Which layers have the window: listed, or from a number on; in `qwen3_moe` all of them."""
    if architecture.name == "qwen3_moe":
        return [True]
    listed = given.get("layer_types", list, None)
    if listed is not None:
        return [kind == "sliding_attention" for kind in listed]
    if architecture.name == "qwen2_moe":  # releases differ in what the number means there
        raise MoelmError(f"{given.origin}: layer_types is missing beside use_sliding_window.")
    first = given.settings.get("max_window_layers")
    if not isinstance(first, int):
        raise MoelmError(f"{given.origin}: max_window_layers is {first!r}; a whole number is expected.")
    return [layer >= first for layer in range(num_layers)]


def _ffn(architecture: Architecture, given: Given) -> Settings:
    if "num_experts" in architecture.ffn and "num_experts" not in given.settings:
        # One setting, two spellings between releases of the library.
        given = Given({**given.settings, "num_experts": given.settings.get("num_local_experts")}, given.origin)
    ffn: Settings = {ours: given.get(theirs, int) for theirs, ours in architecture.ffn.items()}
    if not architecture.sparse:
        return {"kind": "dense", **ffn}
    if architecture.name == "qwen2_moe":
        ffn["shared_experts"] = _shared_experts(given, ffn)
    if architecture.name != "mixtral":
        ffn["router"] = {"kind": "topk", "normalize": given.get("norm_topk_prob", bool)}
    if architecture.name == "glm4_moe":
        ffn["router"] |= {"kind": "sigmoid", "scale": given.get("routed_scaling_factor", float)}
    return {"kind": "moe", **ffn}


def _shared_experts(given: Given, ffn: Settings) -> int:
    """By their width; where some layers are dense by the width of those, for an expert of zeros may stand for none."""
    if ffn["every"] > 1:
        return max(0, int(given.get("intermediate_size", int)) // int(ffn["hidden_dim"]) - int(ffn["top_k"]))
    return int(given.get("shared_expert_intermediate_size", int)) // int(ffn["hidden_dim"])
