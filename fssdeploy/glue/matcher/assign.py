"""Bidirectional assignment: which patches of a picture belong to the object of the support pictures.

Source: Liu et al., "Matcher" (2023), section 3.1 (patch-level matching, eq. 3 to 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

# From more returned pairs than this, only the better half is used.
MANY_PAIRS = 40


@dataclass(frozen=True)
class Matches:
    """What both assignments found; R foreground rows of the reference, N patches of the picture, P = min(R, N) pairs.

    `similarity` float32 (R, N) of foreground rows; `rows` and `columns` (P,) are the pairs of the forward assignment;
    `back` (P,) is the reference row, background included, that each pair's patch was assigned back to and
    `back_similarity` (P,) their cosine; `returned` (P,) bool says which came back to the foreground; `kept` counts the
    pairs left after that test. `patches` (n,) are the patches that become points, ascending.
    """

    similarity: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    back: np.ndarray
    back_similarity: np.ndarray
    returned: np.ndarray
    kept: int
    patches: np.ndarray


def inner_products(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of rows (n, C) with others (m, C): (n, m)."""
    return rows @ others.T


def match(
    reference: np.ndarray,
    foreground: np.ndarray,
    target: np.ndarray,
    products: Callable[[np.ndarray, np.ndarray], np.ndarray] = inner_products,
    weights: np.ndarray | None = None,
) -> Matches:
    """Assign foreground reference rows to patches one-to-one, then those patches back to all reference rows.

    reference (M, C) and target (N, C) float32 of unit length, foreground (M,) bool with at least one row. Pairs that do
    not return to the foreground are dropped, unless all would be; of more than 40 the half of greater similarity stays
    (equal ones in the order of their rows). Both assignments maximise the sum of cosines exactly. Only rows and columns
    that take part are ever multiplied, by `products`, a form of `inner_products`; `weights` float32 (M,) then scale the
    cosines of the reference rows.
    """
    similarity = products(reference[foreground], target)
    if weights is not None:
        similarity = similarity * weights[foreground, None]
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    backward = products(target[columns], reference)
    if weights is not None:
        backward = backward * weights
    pairs, back = linear_sum_assignment(backward, maximize=True)
    if len(pairs) < len(columns):  # a capped reference may have fewer rows than there are pairs
        rows, columns = rows[pairs], columns[pairs]
    returned = foreground[back]
    kept = np.flatnonzero(returned) if returned.any() else np.arange(len(back))
    best_first = np.argsort(-similarity[rows[kept], columns[kept]], kind="stable")
    count = len(kept) // 2 if len(kept) > MANY_PAIRS else len(kept)
    patches = np.sort(columns[kept[best_first[:count]]])
    return Matches(similarity, rows, columns, back, backward[pairs, back], returned, len(kept), patches)


def patch_centres(patches: np.ndarray, grid: int, patch: int) -> np.ndarray:
    """Centres int64 (n, 2), (x, y) in pixels of the canvas, of patches numbered row by row, `grid` of them in a row."""
    return np.stack([patches % grid, patches // grid], -1) * patch + patch // 2


def box_around(points: np.ndarray) -> np.ndarray:
    """The corners (4,), x0, y0, x1, y1, of the smallest box with all points (n, 2) in it or on its border."""
    return np.concatenate([points.min(0), points.max(0)])
