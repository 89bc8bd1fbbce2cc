"""What a mask is worth: how pure it is of matched points, how many it covers, how well it transports to the object.

Source: Liu et al., "Matcher" (2023), section 3.3 (instance-level matching).
"""

from __future__ import annotations

import numpy as np

from fssdeploy.glue.matcher.options import MatcherOptions
from fssdeploy.glue.matcher.transport import transport_value

_LITTLE = np.float32(1e-6)


def purity_and_coverage(touched: np.ndarray, centred: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points inside per patch touched, and points inside per point, float32 (n,); 1e-6 is added to both.

    `touched` and `centred` bool (n, N) are those of `Candidates`; `points` (m,) are the matched patches, whose centres
    are the points.
    """
    inside = np.count_nonzero(centred[:, points], axis=1).astype(np.float32)
    area = np.maximum(np.count_nonzero(touched, axis=1), 1).astype(np.float32)
    return inside / area + _LITTLE, inside / np.float32(len(points)) + _LITTLE


def transport_scores(similarity: np.ndarray, touched: np.ndarray) -> np.ndarray:
    """1 - earth mover's distance between the object's patches and those of each mask, float32 (n,).

    similarity (R, N) of the object's patches with all, touched bool (n, N). The cost of a pair is (1 - cosine) / 2, so
    the value is (1 + the best mean cosine) / 2. It depends on a mask through its patches only: equal ones are solved
    once.
    """
    different, which = np.unique(np.packbits(touched, axis=1), axis=0, return_inverse=True)
    patches = np.unpackbits(different, axis=1, count=touched.shape[1]).astype(bool)
    solved = np.array([(1 + transport_value(similarity[:, row])) / 2 for row in patches], np.float32)
    return solved[which.reshape(-1)]


def passing(values: np.ndarray, threshold: float, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose value reaches the threshold, or else the largest value among them; 0 is no filter."""
    if threshold <= 0 or not len(rows):
        return rows
    return rows[values[rows] >= min(threshold, values[rows].max())]


def combined(emd: np.ndarray, purity: np.ndarray, coverage: np.ndarray, options: MatcherOptions) -> np.ndarray:
    """The score alpha * emd + beta * purity * coverage ** exp, float32."""
    alpha, beta, power = (np.float32(value) for value in (options.alpha, options.beta, options.exp))
    return alpha * emd + beta * purity * coverage**power
