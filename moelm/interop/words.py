"""Which `key=value` words may shape the config of a run whose weights come from elsewhere."""

from collections.abc import Sequence

from moelm.errors import MoelmError

OWN = ("name", "start", "model")
"""What such a run has of its own."""


def check_words(words: Sequence[str], free: Sequence[str], own: Sequence[str] = OWN) -> None:
    """Refuse words that would make the run another than its weights.

    Args:
        free: settings below `own` that may be chosen.

    Raises:
        MoelmError: a word that may not.
    """
    for word in words:
        key = word.partition("=")[0]
        if any(_below(key, section) for section in own) and not any(_below(key, section) for section in free):
            raise MoelmError(
                f"{word!r} cannot be chosen here, where the weights decide; of the model's settings {', '.join(free)} can."
            )


def _below(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")
