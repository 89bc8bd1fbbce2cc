"""The mark in masks and overlays that fssdeploy writes, so that in a folder of pictures they are not taken for one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

_SOFTWARE = 0x0131  # the tag of EXIF
_MARK = "written by fssdeploy"
_HEAD = 2048  # bytes; in front of it is at most the palette of an indexed PNG


def mark() -> Image.Exif:
    """The mark, for the `exif` of Pillow's ``save`` as PNG or JPEG."""
    exif = Image.Exif()
    exif[_SOFTWARE] = _MARK
    return exif


def is_marked(file: Path) -> bool:
    """Whether a regular file carries the mark. False where it cannot be read: whoever opens it will say why."""
    try:
        with file.open("rb") as stream:
            return _MARK.encode() in stream.read(_HEAD)
    except OSError:
        return False
