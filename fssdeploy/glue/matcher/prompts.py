"""From matched points to prompts: k-means centres, and small subsets of points, drawn from one seed per query.

Source: Liu et al., "Matcher" (2023), section 3.2 (robust prompt sampler), and its release for the order in which all
subsets of few candidates are listed.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

# Up to this many candidates every subset is a prompt; of more, subsets are drawn.
FEW_CANDIDATES = 8
LLOYD_ROUNDS = 100
_ATTEMPTS = 16


class Draws:
    """All that is left to chance in one query. Equal seeds and points give equal prompts, whatever was asked before."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def first_centres(self, points: np.ndarray, count: int) -> np.ndarray:
        """Indices (count,) of the points (n, 2) from which k-means starts, far from each other (k-means++)."""
        chosen = [int(self._generator.integers(len(points)))]
        for _ in range(count - 1):
            nearest = np.sqrt(_squared_distances(points, points[chosen])).min(1)
            share = (nearest + 1e-6) ** 2
            chosen.append(int(self._generator.choice(len(points), p=share / share.sum())))
        return np.array(chosen)

    def subsets(self, candidates: np.ndarray, size: int, draws: int) -> np.ndarray:
        """Subsets (m, size, 2) of the candidates (n, 2): every one of few candidates, else `draws`, maybe repeated."""
        count = len(candidates)
        if count <= FEW_CANDIDATES:
            return candidates[all_subsets(count, size)]
        order = self._generator.random((draws, count)).argsort(1)
        return candidates[order[:, :size]]


def all_subsets(count: int, size: int) -> np.ndarray:
    """Every subset of 0 .. count-1, int64 (m, size), each ascending, ordered by last element, then the one before."""
    subsets = np.array(list(combinations(range(count), size)), np.int64)
    return subsets[np.lexsort(subsets.T)]


def cluster_centres(points: np.ndarray, count: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """k-means centres int64 (K, 2), truncated to whole pixels, and the cluster (n,) of each point; K <= count, n.

    It starts anew where a cluster comes out empty; clusters that are empty even then are left out.
    """
    count = min(count, len(points))
    for _ in range(_ATTEMPTS):
        centres, clusters = _lloyd(points, points[draws.first_centres(points, count)].astype(np.float64))
        occupied, numbers = np.unique(clusters, return_inverse=True)
        if len(occupied) == count:
            break
    return centres[occupied].astype(np.int64), numbers


def prompt_sets(
    candidates: np.ndarray, sample_range: tuple[int, int], draws_per_size: int, draws: Draws
) -> list[np.ndarray]:
    """Foreground points of all prompts: for each size in the range one array (m, size, 2).

    With fewer candidates than a size asks for, the range ends (and if need be begins) at their number.
    """
    low, high = (min(size, len(candidates)) for size in sample_range)
    return [draws.subsets(candidates, size, draws_per_size) for size in range(low, high + 1)]


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iteration until the centres stay exactly as they are; an empty cluster keeps its centre."""
    clusters = _squared_distances(points, centres).argmin(1)
    for _ in range(LLOYD_ROUNDS):
        member = (clusters == np.arange(len(centres))[:, None]).astype(np.float64)
        sizes = member.sum(1, keepdims=True)
        moved = np.where(sizes > 0, member @ points / np.maximum(sizes, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres, clusters = moved, _squared_distances(points, moved).argmin(1)
    return centres, clusters


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n, K) float64."""
    return ((points[:, None].astype(np.float64) - centres[None]) ** 2).sum(-1)
