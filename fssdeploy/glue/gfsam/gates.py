"""GF-SAM's choice among the masks of its points: clusters of masks, and two gates.

Source: Zhang et al., "Bridge the Points" (2024), sections 3.3 and 3.4. P masks, one of each point; N cells; C
components. Nothing here needs a mask at full resolution: of 1024 rows and columns, a 37 x 37 grid reads 111 at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from fssdeploy.glue.gfsam.maps import RANGE_EPSILON, PriorMaps, mean_vectors
from fssdeploy.glue.resample import bilinear_weights, nearest_index

# Labels of points.
REJECTED, SELECTED, WAITING = 0, 1, 2


# Masks that are resampled together: as many as a core's cache holds.
CACHED = 8


@dataclass(frozen=True)
class Grid:
    """Pixels of a square mask of side `size` that its reduction to `cells` x `cells` reads.

    `rows` (r,) are all of them, sorted. `low`, `high` and `share` say between which of them a cell lies and how near to
    the second; `corner` is the pixel of a cell's prompt. Indices count within `rows`. Columns are the same.
    """

    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray
    share: np.ndarray
    corner: np.ndarray

    @staticmethod
    def of(size: int, cells: int) -> Grid:
        low, high, share = bilinear_weights(size, cells)
        corner = nearest_index(size, cells)
        rows = np.unique(np.concatenate([low, high, corner]))
        low, high, corner = (np.searchsorted(rows, each) for each in (low, high, corner))
        return Grid(rows, low, high, share, corner)

    def binarise(self, logits: np.ndarray, size: int) -> np.ndarray:
        """Logits (P, h, w), as if enlarged to `size` and cut at 0: bool (P, r, r), at the pixels of `rows` alone."""
        (up, down, share), (left, right, along) = (self._between(count, size) for count in logits.shape[-2:])
        bits = np.empty((len(logits), len(self.rows), len(self.rows)), bool)
        for start in range(0, len(logits), CACHED):
            block = logits[start : start + CACHED]
            first, between = block.take(up, 1), block.take(down, 1)
            between -= first
            between *= share[:, None]
            between += first
            first, across = between.take(left, 2), between.take(right, 2)
            across -= first
            across *= along
            across += first
            np.greater(across, 0, out=bits[start : start + CACHED])
        return bits

    def soften(self, bits: np.ndarray) -> np.ndarray:
        """Masks (P, r, r) from `binarise` -> share of each in every cell, float32 (P, cells * cells)."""
        values = bits.astype(np.float32)
        values = values[:, self.low] + self.share[:, None] * (values[:, self.high] - values[:, self.low])
        values = values[:, :, self.low] + self.share * (values[:, :, self.high] - values[:, :, self.low])
        return values.reshape(len(bits), -1)

    def covered(self, bits: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Whether mask i covers the prompt of point j: bool (P, P); `cells` (P,) are flat indices."""
        rows, columns = np.divmod(cells, len(self.corner))
        return bits[:, self.corner[rows], self.corner[columns]]

    def _between(self, count: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high, share = bilinear_weights(count, size)
        return low[self.rows], high[self.rows], share[self.rows]


@dataclass(frozen=True)
class Clusters:
    """Masks in groups. `label` (P,) is the group of each mask, `order` lists all masks group by group, the groups begin
    at `starts` (C,) in it.
    """

    label: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(label: np.ndarray, rank: np.ndarray | None = None) -> Clusters:
        """Groups from labels 0 to C - 1; within a group the masks go by falling `rank`, then by index."""
        order = np.lexsort((np.zeros(len(label)) if rank is None else -rank, label))
        return Clusters(label, order, np.flatnonzero(np.diff(label[order], prepend=-1)))

    def __len__(self) -> int:
        return len(self.starts)

    def reduce(self, operation: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Values (P, ...) of masks to values (C, ...) of groups."""
        result: np.ndarray = operation.reduceat(values[self.order], self.starts, axis=0)
        return result


def cluster(covered: np.ndarray) -> Clusters:
    """Masks that are linked by points they cover, in either direction; groups are numbered by first occurrence."""
    _, label = connected_components(csr_array(covered), connection="weak")
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return Clusters.of(np.argsort(np.argsort(first))[inverse])


def gate_maps(maps: PriorMaps) -> tuple[np.ndarray, np.ndarray]:
    """What speaks for the object in every cell, and what against it; merged maps, (N,) each."""
    half = (maps.positive.max() + maps.positive.min()) / 2
    return maps.positive**2, maps.negative * half


def positive_gate(
    shares: np.ndarray, clusters: Clusters, union: np.ndarray, maps: PriorMaps, *, last_score: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Accept masks, best first, that add more cells of the object than others to what their component has so far.

    Returns which are accepted, bool (P,), and the score of each one's component, float32 (P,). shares (P, N) and union
    (C, N) are from `Grid.soften`. Masks go by their mean advantage, of equal ones the first. A component's score is
    what its union has more of the object; with `last_score`, what its last mask added.
    """
    towards, against = gate_maps(maps)
    # Sums row by row: equal masks must get equal ranks, which a matrix product does not promise.
    rank = (shares * (towards - against)).sum(1) / (shares.sum(1) + np.float32(RANGE_EPSILON))
    sign = np.where(towards > against, 1.0, -1.0)
    ranked = Clusters.of(clusters.label, rank)
    sizes = np.diff(ranked.starts, append=len(rank))
    # Share of every cell that accepted masks have taken. In float32, as released: where it has come to 1, masks that
    # lie wholly inside add exactly nothing, and are not kept.
    taken = np.zeros_like(union)
    kept = np.zeros(len(rank), bool)
    last = np.zeros(len(ranked))
    for step in range(sizes.max()):  # in turn within a component, all components at a time
        active = np.flatnonzero(sizes > step)
        masks = ranked.order[ranked.starts[active] + step]
        added = shares[masks] * (1 - taken[active])
        last[active] = added @ sign  # summed in float64: sign is
        kept[masks] = last[active] > 0
        taken[active] += added * kept[masks, None]
    score = last if last_score else union @ sign
    return kept, score.astype(np.float32)[clusters.label]


def overshoot_gate(
    units: np.ndarray, cells: np.ndarray, columns: int, clusters: Clusters, union: np.ndarray
) -> np.ndarray:
    """Points that are more alike, per distance, to their own component than to any other: bool (P,).

    units (N, c) of the query; cells (P,), flat; union (C, N). Where a component loses more than half of its points, it
    loses all of them.
    """
    similarity = cluster_similarity(units[cells], units, union)
    places = np.stack(np.divmod(cells, columns), 1).astype(np.float32)
    apart = np.sqrt(((places[:, None] - places) ** 2).sum(2))
    distance = clusters.reduce(np.minimum, apart)
    nearest = (similarity / np.where(distance > 0, distance, 1)).argmax(0)  # of equal ones the first component
    own = nearest == clusters.label
    return own & (clusters.reduce(np.add, np.where(own, 1, -1)) >= 0)[clusters.label]


def cluster_similarity(vectors: np.ndarray, units: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Mean cosine of unit vectors (Q, c) to the query cells under the union of each component: (C, Q)."""
    return mean_vectors(units, union) @ vectors.T
