"""Typed reading of a config.json."""

from typing import Any

from moelm.errors import MoelmError

_TYPE_NAMES: dict[type, str] = {
    int: "a whole number above 0",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section",
}


class HFSettings:
    """The settings of a config.json, or of one of its sections, read by name and type; null counts as missing.

    Args:
        settings: names and values.
        origin: start of the error messages.
    """

    def __init__(self, settings: dict[str, Any], origin: str) -> None:
        self.settings, self.origin = settings, origin

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """The value of a setting.

        Raises:
            MoelmError: it is missing and has no default, or has another type than `kind`.
        """
        value = self.settings.get(key)
        if value is None:
            if default:
                return default[0]
            raise MoelmError(f"{self.origin}: {key} is missing.")
        fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not fits or (kind is int and value < 1):
            raise MoelmError(f"{self.origin}: {key} is {value!r}; {_TYPE_NAMES[kind]} is expected.")
        return float(value) if kind is float else value
