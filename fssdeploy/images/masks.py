"""Masks in and out: what marks the object in a support picture, from arrays, files or text. Nothing is guessed."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fssdeploy.errors import InputError
from fssdeploy.files import open_file, write_atomic
from fssdeploy.images.colours import class_colour
from fssdeploy.images.mark import mark
from fssdeploy.images.npy import array_from_npy, is_npy
from fssdeploy.images.pictures import MAX_PIXELS, open_picture
from fssdeploy.images.rle import decode_rle

_GREY_LEVELS = 16  # more distinct values than this in a grey mask look like soft edges rather than class numbers
_MAX_TEXT = 2**18  # characters of a polygon that came as bytes: every edge costs time
_MAX_COORDINATE = 1e9  # far outside any picture, and safe to compute with


@dataclass
class Mask:
    """Which pixels are the object, and which must not count; both bool (H, W). An ignored pixel is never object."""

    object: np.ndarray
    ignore: np.ndarray

    def __post_init__(self) -> None:
        self.object = self.object & ~self.ignore

    @property
    def area(self) -> int:
        """Pixels of the object."""
        return int(np.count_nonzero(self.object))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.object.shape[0], self.object.shape[1]


def mask_from_array(
    array: np.ndarray, name: str = "mask", label: int | None = None, ignore_label: int = 255, *, indexed: bool = False
) -> Mask:
    """The object of an array (H, W), (H, W, 1), or (H, W, 3) with equal channels; bool, integer, or float of whole 0/1.

    With `label` the object is where the array equals it, and `ignore_label` is ignored (unless it is the label).
    Without, the values must leave no choice: {0, 1} and {0, 255} are binary; {0, 1, `ignore_label`} is an object with
    ignored pixels. `indexed` says that the values are class numbers, so that 255 alone is not an object.
    `name` is what errors call it. Raises InputError for everything else; nothing is thresholded.
    """
    values = _whole_numbers(_one_channel(np.asarray(array), name), name)
    present = {int(value) for value in np.unique(values)}
    if label is not None:
        if label not in present:
            raise InputError(
                "mask_label",
                f"'{name}' has no label {label}",
                f"its labels are {_listed(present)}",
                "Pass one of these as label.",
            )
        return Mask(values == label, _where(values, None if label == ignore_label else ignore_label))
    if present <= {0, 255} and 255 in present and not indexed:
        return Mask(values == 255, _where(values, None))
    if present <= {0, 1, ignore_label}:
        return Mask(values == 1, _where(values, ignore_label))
    if len(present) > _GREY_LEVELS and not indexed:
        raise InputError(
            "mask_grey",
            f"'{name}' has {len(present)} different values",
            "it looks like a grey picture or a mask with soft (antialiased) edges",
            "Threshold it first, or pass a label if the values are class numbers.",
        )
    raise InputError(
        "mask_labels",
        f"'{name}' does not say which label is the object",
        f"its labels are {_listed(present)}",
        "Pass one of these as label.",
    )


def load_mask(
    source: str | os.PathLike[str] | bytes,
    picture_size: tuple[int, int],
    label: int | None = None,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Mask:
    """The mask of a picture of `picture_size` (height, width), of exactly that size.

    `source` is one of

    - a picture file of at most `max_pixels`: 1-bit, grey, indexed (its index numbers count, not its colours) or 16-bit
      labels; an EXIF orientation is applied, as it is to pictures;
    - a ``.npy`` file (without pickled objects);
    - a ``.json`` file with COCO run lengths, ``{"size", "counts"}`` or ``{"segmentation": {"size", "counts"}}``;
    - the text ``box:x0,y0,x1,y1`` or ``polygon:x,y,x,y,x,y,...`` in pixels, x1 and y1 exclusive: a pixel belongs where
      its centre lies inside (even-odd where the outline crosses itself);
    - the bytes of any of these; bytes are never a path.

    `name` is what errors call it (default: the path).

    Values and `label` are read as `mask_from_array` says. Raises InputError: `mask_size` (a mask is never resized),
    `mask_empty`, `mask_outside`, and those of `mask_from_array` and `load_picture`.
    """
    name = name or ("mask" if isinstance(source, bytes) else os.fspath(source))
    array, indexed = _read(source, name, picture_size, max_pixels)
    name = _shortened(name)
    if array.shape[:2] != tuple(picture_size):
        raise InputError(
            "mask_size",
            f"'{name}' is {_sides(array.shape)} pixels (height x width)",
            f"its picture is {_sides(picture_size)}",
            "Draw the mask on the picture itself; masks are never resized.",
        )
    mask = mask_from_array(array, name, label, indexed=indexed)
    if mask.area == 0:
        ignored = mask.ignore.any()
        raise InputError(
            "mask_empty",
            f"'{name}' marks no pixel",
            "255 means 'ignore' in an indexed mask" if ignored else "every pixel is background",
            "Pass label 255 if that is the object." if ignored else "Mark the object.",
        )
    return mask


def save_mask(path: str | os.PathLike[str], mask: np.ndarray) -> None:
    """Write a mask bool (H, W) as an 8-bit grey PNG of 0 and 255. Raises MachineError when it cannot be written."""
    _save_png(path, Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)))


def save_labels(path: str | os.PathLike[str], labels: np.ndarray) -> None:
    """Write labels uint8 (H, W) as an indexed PNG, 0 background. Raises MachineError when it cannot be written."""
    image = Image.fromarray(np.asarray(labels, np.uint8))
    image.putpalette([part for index in range(256) for part in class_colour(index)])
    _save_png(path, image)


def _save_png(path: str | os.PathLike[str], image: Image.Image) -> None:
    if Path(path).suffix.lower() != ".png":
        raise InputError("mask_suffix", f"'{os.fspath(path)}' does not end in .png", "masks are written as PNG")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=mark())
    write_atomic(path, buffer.getvalue())


def _read(
    source: str | os.PathLike[str] | bytes, name: str, size: tuple[int, int], max_pixels: int
) -> tuple[np.ndarray, bool]:
    """The array behind a source, and whether its values are palette indices."""
    if isinstance(source, bytes):
        if source.startswith((b"box:", b"polygon:")):
            return _draw(_checked_text(source), size), False
        if is_npy(source):
            return array_from_npy(source, name), False
        if source.lstrip()[:1] == b"{":  # no picture format begins so
            return _parse_json(source, name), False
    elif isinstance(source, str) and source.startswith(("box:", "polygon:")):
        return _draw(source, size), False
    elif Path(source).suffix.lower() == ".npy":
        return _read_npy(os.fspath(source)), False
    elif Path(source).suffix.lower() == ".json":
        with open_file(source) as stream:
            return _parse_json(stream.read(), name), False
    image = open_picture(source, name, max_pixels=max_pixels)
    if image.mode in ("RGBA", "LA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise InputError(
                "mask_transparent",
                f"'{name}' has transparent pixels",
                "either its colours or its transparency could be the mask",
                "Save the mask without transparency.",
            )
        image = image.convert(image.mode[:-1])
    return np.asarray(image), image.mode == "P"


def _checked_text(data: bytes) -> str:
    """A ``box:`` or ``polygon:`` text that came as bytes, and so perhaps from a stranger."""
    if len(data) > _MAX_TEXT:
        raise InputError(
            "mask_text",
            "a polygon is too long",
            f"it has {len(data)} characters, at most {_MAX_TEXT} are allowed",
            "Send the mask as a PNG file.",
        )
    return data.decode("ascii", "replace")


def _read_npy(name: str) -> np.ndarray:
    open_file(name).close()  # for its errors
    try:
        # Mapped, so that a header that promises a huge array costs nothing before its size is checked; numpy multiplies
        # the sides that the header names, which may overflow.
        with np.errstate(over="raise"):
            array = np.load(name, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        why = "it is an archive of arrays"
    except Exception as error:  # a damaged header raises nearly anything
        why = str(error)
    raise InputError("mask_unreadable", f"'{name}' is not an array file", why, "Write it with numpy.save.")


def _parse_json(text: bytes, name: str) -> np.ndarray:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("mask_unreadable", f"'{name}' is not JSON", str(error), "Export the mask again.") from error
    if isinstance(data, dict) and "segmentation" in data:
        data = data["segmentation"]
    if not isinstance(data, dict):
        raise InputError(
            "mask_unreadable",
            f"'{name}' holds no COCO run lengths",
            'it is neither {"size", "counts"} nor {"segmentation": {"size", "counts"}}',
            "Export the mask as RLE; a polygon can be given as text, polygon:x,y,x,y,...",
        )
    try:
        return decode_rle(data)
    except InputError as error:
        raise InputError(error.code, f"'{name}': {error.what}", error.why, error.fix) from error


def _draw(text: str, size: tuple[int, int]) -> np.ndarray:
    """The mask bool (H, W) of a ``box:`` or ``polygon:`` text."""
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError:
        numbers = []
    if not all(abs(number) <= _MAX_COORDINATE for number in numbers):  # written so that it also refuses NaN
        numbers = []
    if kind == "box" and len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]:
        x0, y0, x1, y1 = numbers
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "polygon" and len(numbers) >= 6 and len(numbers) % 2 == 0:
        corners = np.array(numbers).reshape(-1, 2)
    else:
        raise InputError(
            "mask_text",
            f"'{_shortened(text)}' cannot be read",
            "it is not box:x0,y0,x1,y1 with x0 < x1 and y0 < y1, nor polygon:x,y,x,y,x,y,... of at least three points",
            "Give numbers of pixels, separated by commas.",
        )
    height, width = size
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise InputError(
            "mask_outside",
            f"'{_shortened(text)}' lies outside the picture",
            f"the picture is {_sides(size)} pixels (height x width)",
            "Give x before y, counted from the upper left corner.",
        )
    return _fill(corners, height, width)


def _fill(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bool (H, W): the pixels whose centres lie inside the polygon with these corners (n, 2), x before y; even-odd."""
    toggles = np.zeros((height, width + 1), bool)  # an edge right of the picture toggles the surplus column
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        top, bottom = (min(max(math.ceil(y - 0.5), 0), height) for y in sorted((y0, y1)))
        rows = np.arange(top, bottom)
        crossing = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0) if rows.size else np.empty(0)
        toggles[rows, np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)] ^= True
    return np.logical_xor.accumulate(toggles, axis=1)[:, :width]


def _one_channel(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W) of an array whose channels, if any, are all the same."""
    if array.ndim == 3 and array.shape[2] in (1, 3) and (array == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2 or not array.size:
        raise InputError(
            "mask_shape",
            f"'{name}' has the shape {array.shape}",
            "a mask has one value per pixel" + (", and these channels differ" if array.ndim == 3 else ""),
            "Give a mask of one channel.",
        )
    return array


def _whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """The same values as integers; floats only where they are exactly 0/1 or 0/255."""
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and any(((array == 0) | (array == top)).all() for top in (1, 255)):
        return array.astype(np.uint8)
    raise InputError(
        "mask_values",
        f"'{name}' holds {array.dtype} values that are not all 0 and 1",
        "fractions and the like do not say where the object ends",
        "Threshold it first, or give whole numbers.",
    )


def _where(values: np.ndarray, label: int | None) -> np.ndarray:
    return np.zeros(values.shape, bool) if label is None else values == label


def _listed(labels: set[int]) -> str:
    first = ", ".join(map(str, sorted(labels)[:20]))
    return first + (f", ... ({len(labels)} in all)" if len(labels) > 20 else "")


def _shortened(text: str) -> str:
    """A polygon may have thousands of corners; an error is one line."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[:2]))
