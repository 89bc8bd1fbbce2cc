"""Resampling of grids as ``torch.nn.functional.interpolate`` does it without antialiasing, in float32.

Every output cell reads at most two rows and two columns of the input, so a large mask can be reduced to the rows and
columns that count before anything else is computed.
"""

from __future__ import annotations

import numpy as np


def bilinear_weights(n_in: int, n_out: int, align_corners: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `n_out` output positions along one axis: the two inputs it lies between and the second one's share.

    Returns index0, index1 (int64) and weight1 (float32); a value is ``x[index0] + weight1 * (x[index1] - x[index0])``.
    With `align_corners` the centres of the outermost cells coincide, else the outer edges do. At the upper end both
    indices are the last input.
    """
    steps = np.arange(n_out, dtype=np.float32)
    if align_corners:
        scale = np.float32((n_in - 1) / (n_out - 1)) if n_out > 1 else np.float32(0)
        position = scale * steps
    else:
        position = np.maximum(np.float32(n_in / n_out) * (steps + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    index0 = np.minimum(position.astype(np.int64), n_in - 1)
    index1 = np.minimum(index0 + 1, n_in - 1)
    return index0, index1, np.clip(position - index0, 0, 1, dtype=np.float32)


def bilinear(array: np.ndarray, rows: int, columns: int, align_corners: bool = False) -> np.ndarray:
    """Array (..., h, w) to float32 (..., rows, columns)."""
    array = np.asarray(array, np.float32)
    return _along(_along(array, rows, -2, align_corners), columns, -1, align_corners)


def nearest_index(n_in: int, n_out: int) -> np.ndarray:
    """The input, int64, that each of `n_out` positions reads under the rule "nearest": floor(i * n_in / n_out)."""
    scale = np.float32(n_in / n_out)
    return np.minimum((np.arange(n_out, dtype=np.float32) * scale).astype(np.int64), n_in - 1)


def nearest(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Array (..., h, w) to (..., rows, columns), of the same dtype."""
    return array[..., nearest_index(array.shape[-2], rows)[:, None], nearest_index(array.shape[-1], columns)]


def _along(array: np.ndarray, count: int, axis: int, align_corners: bool) -> np.ndarray:
    """Resample one axis (-2 or -1)."""
    index0, index1, weight1 = bilinear_weights(array.shape[axis], count, align_corners)
    if axis == -2:
        weight1 = weight1[:, None]
    low, high = array.take(index0, axis), array.take(index1, axis)
    # low + w (high - low) gives exactly `low` where both are equal, so that ties stay ties.
    return low + weight1 * (high - low)
