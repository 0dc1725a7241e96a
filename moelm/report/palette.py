"""A color for each expert, on the terminal and on HTML pages.

Up to eight experts get colors that color-blind readers can distinguish (Okabe and Ito 2008, with grey for black). More
get hues a golden angle apart, in three lightnesses, so that experts with nearby numbers look different.
"""

from colorsys import hls_to_rgb

_OKABE_ITO = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_GOLDEN_ANGLE = 0.381966
"""In turns."""
_LIGHTNESSES = (0.42, 0.56, 0.7)


def expert_colors(num_experts: int) -> list[str]:
    """The color of each expert as `#rrggbb`, by its number."""
    if num_experts <= len(_OKABE_ITO):
        return list(_OKABE_ITO[:num_experts])
    return [
        "#" + "".join(f"{round(255 * part):02x}" for part in hls_to_rgb(e * _GOLDEN_ANGLE % 1, _LIGHTNESSES[e % 3], 0.65))
        for e in range(num_experts)
    ]


def text_color_on(color: str) -> str:
    """Black or white, whichever has the higher contrast on a color (relative luminance of WCAG 2)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"
