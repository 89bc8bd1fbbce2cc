"""Between a picture and the square that SAM sees: points and boxes there, low-resolution maps back.

SAM enlarges its maps to the square, cuts out the picture and resamples it to the picture's size. All of these steps are
linear and separable, so they are one sparse matrix per axis, computed once for each size of picture.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array

from fssdeploy.glue.resample import bilinear_weights
from fssdeploy.images.geometry import Placement


def to_picture(maps: np.ndarray, placement: Placement, steps: tuple[int, ...] = ()) -> np.ndarray:
    """Maps (..., h, w) that cover SAM's square to (..., height, width) of the picture, computed in their own dtype.

    As SAM's post-processing: bilinear to the square, the picture cut out, bilinear to its size. `steps` are sides of
    grids that the maps pass through before, also bilinearly. Values that are equal at a border stay exactly equal.
    """
    down = _matrix(maps.shape[-2], (*steps, placement.canvas), placement.rows, placement.height, maps.dtype)
    across = _matrix(maps.shape[-1], (*steps, placement.canvas), placement.cols, placement.width, maps.dtype)
    out = np.empty((*maps.shape[:-2], placement.height, placement.width), maps.dtype)
    for index in np.ndindex(maps.shape[:-2]):
        out[index] = down @ np.ascontiguousarray((across @ np.ascontiguousarray(maps[index].T)).T)
    return out


def to_canvas(points: np.ndarray, placement: Placement) -> np.ndarray:
    """Points (..., 2), each (x, y) in pixels of the picture, to float32 pixels of SAM's square."""
    scale = np.array([placement.cols / placement.width, placement.rows / placement.height])
    return (points * scale).astype(np.float32)


def tight_box(mask: np.ndarray) -> np.ndarray | None:
    """Outermost pixels of a mask bool (H, W), int64 (x0, y0, x1, y1), both ends included; None of an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.int64)


@lru_cache(maxsize=32)
def _matrix(cells: int, steps: tuple[int, ...], kept: int, size: int, dtype: np.dtype) -> csr_array:
    """(size, cells): resample `cells` values to each of `steps`, keep the first `kept`, resample to `size`."""
    matrix = np.eye(cells)
    for count in steps:
        matrix = _resampled(matrix, count)
    return csr_array(_resampled(matrix[:kept], size).astype(dtype))


def _resampled(matrix: np.ndarray, count: int) -> np.ndarray:
    index0, index1, weight1 = bilinear_weights(len(matrix), count)
    return matrix[index0] + weight1[:, None] * (matrix[index1] - matrix[index0])
