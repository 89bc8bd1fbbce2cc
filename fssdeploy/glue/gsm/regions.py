"""Regions of the query picture from its edges, and how alike they are (GSM, equations (4) and (5)).

Everything lives on the host's feature grid of h x w cells; cells are counted row by row, N = h w. No torch.
"""

from __future__ import annotations

import heapq

import numpy as np
from scipy import ndimage, sparse

from fssdeploy.glue.resample import bilinear

LUMINANCE = (0.299, 0.587, 0.114)


def adaptive_average(array: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(H, W) to float32 (h, w): mean of rows floor(i H/h) to ceil((i+1) H/h) - 1, and columns alike.

    Sums of 0/1 masks below 2^24 are exact, so a comparison with one half is too.
    """
    down, across = (_membership(size, cells) for size, cells in zip(array.shape, grid, strict=True))
    area = down.sum(1)[:, None] * across.sum(1)
    return (down @ array.astype(np.float32) @ across.T / area).astype(np.float32)


def _membership(size: int, cells: int) -> np.ndarray:
    """(cells, size) float32, 1 where a pixel belongs to a cell; a pixel cut by a border belongs to both."""
    index, cell = np.arange(size), np.arange(cells)
    first, stop = cell * size // cells, -(-(cell + 1) * size // cells)
    return ((index >= first[:, None]) & (index < stop[:, None])).astype(np.float32)


def edge_strength(picture: np.ndarray, grid: tuple[int, int], resize: str) -> np.ndarray:
    """Sobel magnitude of the luminance of uint8 (H, W, 3), brought to float32 (h, w) by "area" mean or "bilinear"."""
    luminance = np.zeros(picture.shape[:2], np.float32)
    for channel, weight in enumerate(LUMINANCE):
        luminance += picture[..., channel] * np.float32(weight / 255)
    padded = np.pad(luminance, 1, mode="edge")
    rise, fall = padded[2:] - padded[:-2], padded[:, 2:] - padded[:, :-2]
    down = (rise[:, :-2] + rise[:, 2:]) / 8 + rise[:, 1:-1] / 4
    across = (fall[:-2] + fall[2:]) / 8 + fall[1:-1] / 4
    magnitude = np.sqrt(down * down + across * across)
    return adaptive_average(magnitude, grid) if resize == "area" else bilinear(magnitude, *grid)


def edge_threshold(strength: np.ndarray, rule: str | float) -> float:
    """The level above which a cell is an edge: the "mean", "otsu", or a quantile given as a number from 0 to 1."""
    if rule == "mean":
        return float(strength.mean(dtype=np.float64))
    if rule == "otsu":
        return _otsu(strength)
    return float(np.quantile(strength, float(rule)))


def _otsu(strength: np.ndarray) -> float:
    """Exact Otsu: the split of the sorted values with the largest variance between both sides, midpoint taken."""
    values = np.sort(strength.ravel().astype(np.float64))
    below = np.arange(1, values.size)
    sums = np.cumsum(values)
    mean_below, mean_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / (values.size - below)
    split = int(np.argmax(below * (values.size - below) * (mean_above - mean_below) ** 2))
    return float((values[split] + values[split + 1]) / 2)


def edge_regions(strength: np.ndarray, threshold: float, edge_cells: str, connectivity: int) -> np.ndarray:
    """Connected cells that are no edge, and what becomes of edge cells: int32 (h, w), numbered row by row.

    `edge_cells`: "nearest" joins them to the nearest region (breadth first, the smaller number wins a tie),
    "watershed" floods from the regions in order of edge strength, "own" makes each a region, "single" makes them one.
    """
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    is_edge = strength > threshold
    labels, count = ndimage.label(~is_edge, structure)
    if edge_cells == "own":
        labels[is_edge] = count + 1 + np.arange(is_edge.sum())
    elif edge_cells == "single":
        labels[is_edge] = count + 1
    elif edge_cells == "watershed":
        labels = _flood(labels, strength, structure)
    else:
        labels = _join_nearest(labels, structure)
    return numbered(labels)


def _join_nearest(labels: np.ndarray, structure: np.ndarray) -> np.ndarray:
    nobody = np.iinfo(labels.dtype).max
    labels = np.where(labels == 0, nobody, labels)
    while (labels == nobody).any():
        # One ring of cells at a time, so that all of a ring see the same neighbours.
        around = ndimage.minimum_filter(labels, footprint=structure, mode="nearest")
        labels = np.where(labels == nobody, around, labels)
    return labels


def _flood(labels: np.ndarray, strength: np.ndarray, structure: np.ndarray) -> np.ndarray:
    """Watershed: the weakest edge cell next to a region joins it first; of equal ones the first reached."""
    labels = labels.copy()
    steps = np.argwhere(structure) - 1
    queue = [(0.0, age, int(row), int(col)) for age, (row, col) in enumerate(np.argwhere(labels))]
    age = len(queue)
    while queue:
        _, _, row, col = heapq.heappop(queue)
        for down, across in steps:
            y, x = row + int(down), col + int(across)
            if 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] and labels[y, x] == 0:
                labels[y, x] = labels[row, col]
                heapq.heappush(queue, (float(strength[y, x]), age, y, x))
                age += 1
    return labels


def numbered(labels: np.ndarray) -> np.ndarray:
    """The same partition as int32, numbered from 0 by first occurrence row by row."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int32)
    rank[np.argsort(first)] = np.arange(first.size)
    return rank[inverse].reshape(labels.shape)


def region_similarity(units: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Equation (5): mean cosine of all pairs of cells of two regions, float32 (l, l).

    `units` (N, c) are unit features, `labels` (N,) the regions 0 to l-1. The double sum over pairs is the product of
    the regions' mean vectors, so no N x N matrix is needed.
    """
    sizes = np.bincount(labels)
    member = sparse.csr_array(
        ((1 / sizes).astype(np.float32)[labels], (labels, np.arange(labels.size))), shape=(sizes.size, labels.size)
    )
    means = member @ units
    return means @ means.T
