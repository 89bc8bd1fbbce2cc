"""What the field measures: IoU by class, foreground-background IoU, DAVIS' boundary measure, bootstrap intervals.

IoUs are shares (0 to 1) here; reports turn them into percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import numpy as np

from fssdeploy.data.dataset import IGNORE

# Distance within which DAVIS takes two boundary pixels for the same, as a part of the picture's diagonal.
BOUNDARY_TOLERANCE = 0.008
RESAMPLES = 2000
CONFIDENCE = 0.95

# Areas of the episodes of every class, int64 (episodes, 4), columns as the fields of `Areas`.
AreasByClass = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Areas:
    """Pixels of one episode where prediction and truth agree (`intersection`) and where either holds (`union`)."""

    intersection: int
    union: int
    background_intersection: int
    background_union: int

    @property
    def iou(self) -> float:
        """Of this episode's foreground; published results are never means of these."""
        return self.intersection / max(self.union, 1)

    def as_row(self) -> tuple[int, ...]:
        return astuple(self)


def measure_areas(prediction: np.ndarray, truth: np.ndarray) -> Areas:
    """Areas of a mask bool (H, W) against truth uint8 (H, W) of 0, 1 and 255; pixels that are 255 do not count."""
    valid = truth != IGNORE
    found, wanted = prediction & valid, truth == 1
    intersection = int(np.count_nonzero(found & wanted))
    union = int(np.count_nonzero(found | wanted))
    either_background = int(np.count_nonzero(valid)) - intersection
    return Areas(intersection, union, either_background - (union - intersection), either_background)


def class_ious(areas: AreasByClass) -> dict[int, float]:
    """IoU of every class: intersections and unions are summed over its episodes first (HSNet's protocol).

    A class of which nothing was to be found and nothing was found has IoU 0, as in the published code.
    """
    return {index: _iou(rows[:, :2].sum(0)) for index, rows in areas.items()}


def mean_iou(areas: AreasByClass) -> float:
    """Mean of `class_ious`: every class weighs the same, however many episodes it has."""
    return float(np.mean(list(class_ious(areas).values())))


def foreground_background_iou(areas: AreasByClass) -> float:
    """Mean of the IoUs of foreground and background, each summed over all episodes whatever their class (FB-IoU)."""
    total = np.concatenate(list(areas.values())).sum(0)
    return (_iou(total[:2]) + _iou(total[2:])) / 2


def resampled_mean_ious(areas: AreasByClass, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """`mean_iou` of lists drawn anew, float64 (resamples,): as many episodes of every class, with replacement.

    Classes are fixed, since the data set's classes are no sample: the spread is that of the choice of episodes.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for rows in areas.values():
        drawn = generator.integers(len(rows), size=(resamples, len(rows)))
        sums = rows[:, :2][drawn].sum(1)
        means += sums[:, 0] / np.maximum(sums[:, 1], 1) / len(areas)
    return means


def interval(samples: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Lower and upper end of the percentile bootstrap interval."""
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def boundary_f(prediction: np.ndarray, truth: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """F of boundary precision and recall between masks bool (H, W): DAVIS' contour accuracy.

    A boundary pixel is right if a boundary pixel of the other mask lies within a disk of `tolerance` times the diagonal
    of the picture, rounded up. Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
    Segmentation", section 4, and its public evaluation code, also for masks without any boundary.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    found, wanted = boundary(prediction), boundary(truth)
    found_count, wanted_count = np.count_nonzero(found), np.count_nonzero(wanted)
    if found_count == 0 or wanted_count == 0:
        return 1.0 if found_count == wanted_count else 0.0
    precision = np.count_nonzero(found & dilate(wanted, radius)) / found_count
    recall = np.count_nonzero(wanted & dilate(found, radius)) / wanted_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels bool (H, W) that differ from their neighbour to the right, below, or right below."""
    edges = np.zeros_like(mask)
    edges[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edges[:-1] |= mask[:-1] ^ mask[1:]
    edges[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edges


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels bool (H, W) within Euclidean distance `radius` of a pixel of the mask."""
    height, width = mask.shape
    padded = np.pad(mask, radius)
    # counts[y, x]: pixels of the mask in row y left of column x, so that a span of any length costs one subtraction.
    counts = np.pad(padded.cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))
    grown = np.zeros_like(mask)
    for row in range(2 * radius + 1):
        half = math.isqrt(radius**2 - (row - radius) ** 2)
        first = radius - half
        window = counts[row : row + height]
        grown |= window[:, radius + half + 1 :][:, :width] > window[:, first : first + width]
    return grown


def _iou(sums: np.ndarray) -> float:
    return float(sums[0] / max(int(sums[1]), 1))
