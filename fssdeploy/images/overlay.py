"""Pictures out: masks drawn over a picture, sheets of many pictures, and files."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fssdeploy.errors import InputError
from fssdeploy.files import write_atomic
from fssdeploy.images.colours import class_colour
from fssdeploy.images.mark import mark

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_TINT = 0.42  # enough to see the class, little enough to see what is under it
_SEAM = 0.5
_MIN_LINE = 2.4  # pixels; `_contour` needs 2.3 to vanish away from an edge
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_PAPER, _INK = (250, 250, 250), (40, 44, 52)


def overlay(picture: np.ndarray, masks: Mapping[str, np.ndarray], *, max_side: int = 1600) -> np.ndarray:
    """Picture uint8 (H, W, 3) with the masks bool (H, W) of named classes: tint, contour and a legend.

    The result is uint8 (h, w, 3), the picture made smaller where its longest side is above `max_side`. The legend lies
    in the corner where it hides the least of the masks, and is left out where the picture is too small for it. Colours
    follow the order of `masks`, as `class_colour`. Raises InputError for a mask of another size.
    """
    for name, mask in masks.items():
        if mask.shape != picture.shape[:2]:
            raise InputError(
                "mask_size",
                f"the mask of '{name}' is {mask.shape[0]} x {mask.shape[1]} pixels (height x width)",
                f"its picture is {picture.shape[0]} x {picture.shape[1]}",
            )
    image = Image.fromarray(picture)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    softs = [Image.fromarray(mask).convert("L").resize(image.size, Image.Resampling.BOX) for mask in masks.values()]
    line = max(_MIN_LINE, max(image.size) / 220)
    canvas = np.asarray(image, np.float32)
    for index, soft in enumerate(softs, start=1):
        canvas = _blend(canvas, class_colour(index), _TINT * np.asarray(soft, np.float32) / 255)
    for index, soft in enumerate(softs, start=1):
        # A dark seam on both sides keeps the line apart from what lies around it, whatever its colour.
        canvas = _blend(canvas, (0, 0, 0), _SEAM * _contour(soft, 1.7 * line))
        canvas = _blend(canvas, class_colour(index), _contour(soft, line))
    drawn = Image.fromarray((canvas + 0.5).astype(np.uint8))
    covered = np.zeros(canvas.shape[:2], bool)
    for soft in softs:
        covered |= np.asarray(soft) > 127
    return np.array(_with_legend(drawn, list(masks), covered))


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], cell: int = 256
) -> np.ndarray:
    """A picture uint8 (h, w, 3) of rows of pictures uint8 (H, W, 3), every one with its caption below.

    The longest side of every picture becomes `cell` pixels. `captions` has the form of `rows`; rows may differ in
    length. Raises InputError when there is no picture or the two differ in form.
    """
    if not any(rows) or [len(row) for row in rows] != [len(row) for row in captions]:
        raise InputError(
            "sheet_form",
            "a contact sheet needs pictures and one caption for each",
            "the rows differ in number or length",
        )
    font = _font(max(10, cell // 18))
    gap = max(6, cell // 20)
    below = gap // 2 + _line_height(font) + gap
    fitted = [[_scaled(picture, cell) for picture in row] for row in rows]
    heights = [max((image.height for image in row), default=0) for row in fitted]
    size = (max(map(len, rows)) * (cell + gap) + gap, sum(heights) + len(rows) * below + gap)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    base = gap
    for images, names, height in zip(fitted, captions, heights, strict=True):
        base += height  # pictures of a row stand on one line, their captions under it
        for column, (image, name) in enumerate(zip(images, names, strict=True)):
            left = gap + column * (cell + gap)
            sheet.paste(image, (left + (cell - image.width) // 2, base - image.height))
            pen.text((left + cell / 2, base + gap // 2), _clipped(name, font, cell), fill=_INK, font=font, anchor="ma")
        base += below
    return np.array(sheet)


def save_picture(path: str | os.PathLike[str], picture: np.ndarray, *, marked: bool = False) -> None:
    """Write a picture uint8 (H, W, 3) as PNG or JPEG, as the suffix says; `marked` (fssdeploy.images.mark) or not.

    Raises InputError for another suffix, MachineError when it cannot be written.
    """
    form = _FORMATS.get(Path(path).suffix.lower())
    if form is None:
        raise InputError(
            "picture_suffix", f"'{os.fspath(path)}' does not end in .png, .jpg or .jpeg", fix="Choose another name."
        )
    buffer = io.BytesIO()
    # PNG knows neither option and ignores them; without colour subsampling contours stay crisp.
    Image.fromarray(picture).save(buffer, form, quality=92, subsampling=0, exif=mark() if marked else b"")
    write_atomic(path, buffer.getvalue())


def _blend(canvas: np.ndarray, colour: tuple[int, int, int], opacity: np.ndarray) -> np.ndarray:
    """Canvas float32 (h, w, 3) with a colour laid over it, as strongly as `opacity` (h, w), 0 to 1, says."""
    return canvas + opacity[..., None] * (np.array(colour, np.float32) - canvas)


def _contour(soft: Image.Image, width: float) -> np.ndarray:
    """Opacity float32 (h, w), 0 to 1, of a smooth line about `width` pixels wide along the edge of a mask 0 to 255.

    Blurred by a Gaussian of deviation s, a straight edge lies within 0.4 of one half up to 1.28 s away from it, and is
    0.175 / s steep there: so the line has this width and ends softly over one pixel.
    """
    deviation = width / 2.56
    blurred = np.asarray(soft.filter(ImageFilter.GaussianBlur(deviation)), np.float32) / 255
    return (0.5 + (0.4 - np.abs(blurred - 0.5)) * (deviation / 0.175)).clip(0.0, 1.0)


def _scaled(picture: np.ndarray, longest: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _with_legend(image: Image.Image, names: Sequence[str], covered: np.ndarray) -> Image.Image:
    """The image with the names of its classes in the corner where they hide least of `covered` bool (h, w)."""
    font = _font(min(28, max(11, max(image.size) // 42)))
    height = _line_height(font)
    margin, swatch = height // 2, round(0.8 * height)
    room = image.width - 5 * margin - swatch
    names = [_clipped(name, font, room) for name in names]
    panel_w = round(max((font.getlength(name) for name in names), default=0)) + 3 * margin + swatch
    panel_h = len(names) * height + margin
    if not names or panel_w > image.width - 2 * margin or panel_h > image.height - 2 * margin:
        return image
    right, bottom = image.width - margin - panel_w, image.height - margin - panel_h
    corners = [(x, y) for y in (margin, bottom) for x in (margin, right)]
    left, top = min(corners, key=lambda corner: covered[corner[1] :, corner[0] :][:panel_h, :panel_w].sum())
    panel = Image.new("RGBA", image.size)
    pen = ImageDraw.Draw(panel)
    pen.rounded_rectangle((left, top, left + panel_w, top + panel_h), margin // 2, fill=(16, 18, 24, 190))
    for index, name in enumerate(names):
        x, middle = left + margin, top + margin / 2 + (index + 0.5) * height
        box = (x, middle - swatch / 2, x + swatch, middle + swatch / 2)
        pen.rounded_rectangle(box, swatch // 4, fill=class_colour(index + 1))
        pen.text((x + swatch + margin, middle), name, fill="white", font=font, anchor="lm")
    return Image.alpha_composite(image.convert("RGBA"), panel).convert("RGB")


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _line_height(font: _Font) -> int:
    _, top, _, bottom = font.getbbox("Ágy")
    return round(1.25 * (bottom - top))


def _clipped(text: str, font: _Font, room: float) -> str:
    """The text on one line, its end replaced by dots where it is longer than `room` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
