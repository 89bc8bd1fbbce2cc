"""Where a picture lies on the square canvas that an encoder sees, and the way there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from fssdeploy.errors import InputError

PADDING_COLOUR = (124, 116, 104)  # the ImageNet mean: exactly "nothing" once an encoder has normalised it


@dataclass(frozen=True)
class Placement:
    """Where one picture lies on its canvas: all that is needed to bring a mask back to the picture.

    `height`, `width` are those of the original picture; `canvas` is the side of the square canvas; the picture occupies
    the rectangle of `rows` x `cols` canvas pixels whose upper left corner is (`top`, `left`).
    """

    height: int
    width: int
    canvas: int
    top: int
    left: int
    rows: int
    cols: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, int]) -> Placement:
        return Placement(**data)


def place(height: int, width: int, canvas: int, mode: str) -> Placement:
    """Lay a picture of `height` x `width` pixels on a square of side `canvas`.

    "squash" fills the whole canvas and does not keep the aspect; "letterbox" keeps it: the longest side fills the
    canvas, the picture is anchored at the upper left corner, the rest is padding. Raises InputError for sizes below 1
    and an unknown mode.
    """
    if min(height, width, canvas) < 1:
        raise InputError(
            "picture_size",
            f"a picture of {height} x {width} pixels cannot be laid on a canvas of side {canvas}",
            "every side must be at least one pixel",
        )
    if mode == "squash":
        return Placement(height, width, canvas, 0, 0, canvas, canvas)
    if mode == "letterbox":
        longest = max(height, width)
        rows, cols = (max(1, int(side * canvas / longest + 0.5)) for side in (height, width))
        return Placement(height, width, canvas, 0, 0, rows, cols)
    raise InputError("placement_mode", f"unknown placement '{mode}'", fix="Use 'squash' or 'letterbox'.")


def fit_picture(picture: np.ndarray, placement: Placement) -> np.ndarray:
    """Picture uint8 (height, width, 3) to canvas uint8 (S, S, 3): bilinear, antialiased where it shrinks."""
    _check_size(picture, placement)
    size = (placement.cols, placement.rows)
    fitted = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    canvas = np.empty((placement.canvas, placement.canvas, 3), np.uint8)
    canvas[:] = PADDING_COLOUR
    canvas[_occupied(placement)] = fitted
    return canvas


def fit_mask(mask: np.ndarray, placement: Placement) -> np.ndarray:
    """Mask bool (height, width) to float32 (S, S): the part of every canvas pixel that the object covers, 0 to 1."""
    _check_size(mask, placement)
    covered = _area_average(_area_average(mask, placement.rows).T, placement.cols).T
    canvas = np.zeros((placement.canvas, placement.canvas), np.float32)
    canvas[_occupied(placement)] = covered.clip(0.0, 1.0)
    return canvas


def unfit(logits: np.ndarray, placement: Placement) -> np.ndarray:
    """Logits float32 (h, w) that cover the whole canvas, at any resolution, to float32 (height, width) of the picture.

    The occupied part is cut out and resized in one bilinear step (antialiased where it shrinks), so that it may begin
    and end between two logits.
    """
    h, w = logits.shape
    down, right = h / placement.canvas, w / placement.canvas
    box = (
        placement.left * right,
        placement.top * down,
        (placement.left + placement.cols) * right,
        (placement.top + placement.rows) * down,
    )
    image = Image.fromarray(np.asarray(logits, np.float32))
    size = (placement.width, placement.height)
    return np.array(image.resize(size, Image.Resampling.BILINEAR, box=box))


def _occupied(placement: Placement) -> tuple[slice, slice]:
    rows = slice(placement.top, placement.top + placement.rows)
    return rows, slice(placement.left, placement.left + placement.cols)


def _check_size(array: np.ndarray, placement: Placement) -> None:
    if array.shape[:2] != (placement.height, placement.width):
        raise InputError(
            "picture_size",
            f"an array of {array.shape[0]} x {array.shape[1]} pixels does not fit its placement",
            f"the placement was made for {placement.height} x {placement.width}",
        )


def _area_average(array: np.ndarray, count: int) -> np.ndarray:
    """(n, m) to float32 (count, m): every row the mean over its share of the n rows, cut rows weighing by their part.

    Pillow's BOX filter counts a cut row wholly or not at all, which loses or doubles thin objects at uneven ratios.
    """
    edges = np.arange(count + 1) * (array.shape[0] / count)
    edges[-1] = array.shape[0]
    averaged = np.empty((count, array.shape[1]), np.float32)
    for row, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        first, last = int(start), int(np.ceil(stop))
        inside = np.arange(first, last)
        weights = np.minimum(inside + 1, stop) - np.maximum(inside, start)
        averaged[row] = (weights / weights.sum()).astype(np.float32) @ array[first:last].astype(np.float32)
    return averaged
