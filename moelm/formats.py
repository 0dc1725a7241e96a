"""Numbers, times and lists as text for people."""

from collections.abc import Sequence


def quantity(x: float) -> str:
    """A count in three digits or fewer: `850`, `4.9M`, `181M`."""
    scaled = float(x)
    for unit in ("", "K", "M", "B", "T"):
        if scaled < 999.5 or unit == "T":
            break
        scaled /= 1000
    return f"{scaled:.0f}{unit}" if not unit or scaled >= 99.95 else f"{scaled:.1f}{unit}"


def byte_size(count: float) -> str:
    """Bytes in decimal units: `36.5 MB`, `2.1 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def exponent(x: float) -> str:
    """A large number as `1.2e15`."""
    digits, _, power = f"{x:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def duration(seconds: float) -> str:
    """A time in its most readable unit: `8.5 s`, `3.0 min`, `2.4 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def dollars(x: float) -> str:
    """A price: `$0.0042`, `$3.10`, `$1,200`."""
    if x >= 1000:
        return f"${x:,.0f}"
    return f"${x:.2f}" if x >= 1 else f"${x:.2g}"


def join_names(names: Sequence[str]) -> str:
    """`one, two and three`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def count_noun(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
