"""Masks as COCO run lengths, there and back. Whatever comes from outside is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco

from fssdeploy.errors import InputError
from fssdeploy.images.pictures import MAX_PIXELS

_MAX_CHARACTERS = 6  # of one number: 30 bits hold every run of a picture of MAX_PIXELS, and cannot overflow


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Mask bool (H, W) to ``{"size": [H, W], "counts": compressed text}``, as in COCO's JSON files.

    Raises InputError when it is not a mask of two dimensions.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 2 or not mask.size:
        raise InputError("mask_shape", f"an array {mask.dtype} {mask.shape} is not a mask", "it must be bool (H, W)")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """COCO run lengths, compressed text or a list of numbers, to a mask bool (H, W).

    Raises InputError for anything malformed. pycocotools reads past the end of a malformed text, so that text is never
    handed to it.
    """
    height, width = _size(rle)
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        runs = _runs_of_text(counts)
    elif isinstance(counts, list):
        if not all(type(run) is int and 0 <= run <= MAX_PIXELS for run in counts):
            raise _malformed("its counts are not whole numbers from 0 up")
        runs = np.array(counts, np.int64)
    else:
        raise _malformed("its counts are neither text nor a list")
    if (runs < 0).any() or runs.sum() != height * width:
        raise _malformed(f"its runs do not add up to {height} x {width} pixels")
    # Runs go down the columns and alternate, beginning with background.
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)
    return np.ascontiguousarray(columns.T)


def _size(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise _malformed("its size is not [height, width]")
    if size[0] * size[1] > MAX_PIXELS:
        raise _malformed(f"it has more than {MAX_PIXELS // 10**6} million pixels")
    return size[0], size[1]


def _runs_of_text(text: str | bytes) -> np.ndarray:
    """The run lengths in COCO's text: 5 bits a character from '0' up, the sixth bit says that the number goes on."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - ord("0")
    goes_on = (digits & 32) != 0
    if not digits.size or digits.min() < 0 or digits.max() > 63 or goes_on[-1]:
        raise _malformed("its counts are not COCO's compressed text")
    last = np.flatnonzero(~goes_on)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > _MAX_CHARACTERS:
        raise _malformed("its counts hold a number that is too large")
    place = np.arange(digits.size) - np.repeat(first, length)
    numbers = np.add.reduceat((digits & 31) << (5 * place), first)
    numbers -= np.where(digits[last] & 16, 1 << (5 * length), 0)  # two's complement
    # From the fourth on, a number is the difference from the one two before it.
    runs = numbers.copy()
    runs[1::2], runs[2::2] = np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])
    return runs


def _malformed(why: str) -> InputError:
    return InputError("rle_malformed", "the run lengths (RLE) cannot be read", why, "Export the mask again.")
