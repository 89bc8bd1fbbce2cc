"""What PerSAM remembers of an object: which cells of the support are its own, and the mean of their features.

Source: Zhang et al., "Personalize Segment Anything Model with One Shot" (2023), section 3.2, and the released code.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from fssdeploy.glue.resample import bilinear
from fssdeploy.images.geometry import Placement

# SAM's normalisation of the red channel, through which the released code sends masks like pictures.
RED_MEAN, RED_STD = 123.675, 58.395
_TINY = np.finfo(np.float32).tiny


def mask_as_picture(mask: np.ndarray, value: int, placement: Placement) -> np.ndarray:
    """A mask bool (height, width) in one grey value, treated like a picture by SAM: float32 (S, S), padding 0."""
    grey = Image.fromarray(np.where(mask, value, 0).astype(np.uint8))
    fitted = np.asarray(grey.resize((placement.cols, placement.rows), Image.Resampling.BILINEAR), np.float32)
    canvas = np.zeros((placement.canvas, placement.canvas), np.float32)
    canvas[: placement.rows, : placement.cols] = (fitted - np.float32(RED_MEAN)) / np.float32(RED_STD)
    return canvas


def cells_of_picture(canvas: np.ndarray, grid: int) -> np.ndarray:
    """What `mask_as_picture` returned at the resolution of features, float32 (grid, grid): object where above 0."""
    return bilinear(canvas, grid, grid)


def cover(fitted: np.ndarray, grid: int) -> np.ndarray:
    """Shares of the object in canvas pixels (S, S) to its share of every cell, (grid, grid)."""
    side = fitted.shape[-1] // grid
    return fitted.reshape(grid, side, grid, side).mean((1, 3))


def at_least_one(selected: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The selected cells (g, g) bool; where there is none, the one that the object covers most."""
    if selected.any():
        return selected
    only = np.zeros_like(selected)
    only.flat[covered.argmax()] = True
    return only


def unit(vectors: np.ndarray, axis: int) -> np.ndarray:
    """Vectors along `axis` at length 1; zeros stay zeros."""
    length = np.sqrt((vectors * vectors).sum(axis, keepdims=True))
    return vectors / np.maximum(length, _TINY)


def target_of_mean(features: np.ndarray) -> np.ndarray:
    """PerSAM: the mean of the object's features (n, C), not normalised, float32 (C,)."""
    return features.mean(0, dtype=np.float32)


def target_of_mean_and_peak(features: np.ndarray) -> np.ndarray:
    """PerSAM-F and videos: half the mean and half the largest value of every channel, float32 (C,)."""
    return features.max(0) / 2 + target_of_mean(features) / 2
