"""A colour for each expert, on the terminal and on the page.

Up to eight experts have colours that the colour-blind tell apart (Okabe and Ito 2008, with grey for black); more take hues
a golden angle apart, in three lightnesses, so that experts with numbers near each other look different.
"""

from colorsys import hls_to_rgb

_FEW = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_GOLDEN = 0.381966
_LIGHTNESSES = (0.42, 0.56, 0.7)


def expert_colours(num_experts: int) -> list[str]:
    """As `#rrggbb`, by the number of the expert."""
    if num_experts <= len(_FEW):
        return list(_FEW[:num_experts])
    return [
        "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb(e * _GOLDEN % 1, _LIGHTNESSES[e % 3], 0.65))
        for e in range(num_experts)
    ]


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour (relative luminance of WCAG 2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"
