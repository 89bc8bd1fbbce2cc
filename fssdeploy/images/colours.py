"""The colours of classes: the same in overlays and in indexed mask files."""

from __future__ import annotations

import colorsys

# Chosen by eye to stay apart from each other and to stand out on photographs.
_FIRST = (
    (255, 64, 96),
    (0, 180, 255),
    (255, 196, 0),
    (0, 208, 132),
    (168, 96, 255),
    (255, 128, 32),
    (0, 224, 224),
    (255, 96, 208),
    (152, 208, 0),
    (64, 112, 255),
)
_GOLDEN_ANGLE = 0.618034  # of a turn: successive hues never come close


def class_colour(index: int) -> tuple[int, int, int]:
    """RGB, 0 to 255, of class `index`: 0 is the background (black), classes count from 1."""
    if index == 0:
        return (0, 0, 0)
    if index <= len(_FIRST):
        return _FIRST[index - 1]
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.7))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN_ANGLE % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
