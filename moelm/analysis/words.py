"""Figures as people read them."""

from collections.abc import Sequence


def quantity(x: float) -> str:
    """A count in three digits or fewer: `850`, `4.9M`, `181M`."""
    scaled = float(x)
    for unit in ("", "K", "M", "B", "T"):
        if scaled < 999.5 or unit == "T":
            break
        scaled /= 1000
    return f"{scaled:.0f}{unit}" if not unit or scaled >= 99.95 else f"{scaled:.1f}{unit}"


def exponent(x: float) -> str:
    """A large number as `1.2e15`."""
    digits, _, power = f"{x:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def duration(seconds: float) -> str:
    """A time in the unit in which it is easiest to read."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def dollars(x: float) -> str:
    """A price: `$0.0042`, `$3.10`, `$1,200`."""
    if x >= 1000:
        return f"${x:,.0f}"
    return f"${x:.2f}" if x >= 1 else f"${x:.2g}"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
