"""GF-SAM's prior: how much every cell of the query looks like the object and like its surroundings, and the points.

Source: Zhang et al., "Bridge the Points: Graph-based Few-shot Segment Anything Semantically" (2024), section 3.2.
A *reference* is a set of cells with known weights: a support picture and its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

# In the denominators of the released code.
MEAN_EPSILON, RANGE_EPSILON = 1e-7, 1e-6


@dataclass(frozen=True)
class PriorMaps:
    """Cosines of the N query cells to references, float32: one row for each of k references, or merged without rows.

    `positive` (k, N) is the mean and `peak` (k, N) the largest cosine to the object, `negative` (k, N) the mean cosine
    to the surroundings.
    """

    positive: np.ndarray
    peak: np.ndarray
    negative: np.ndarray

    def mean(self) -> PriorMaps:
        """The maps of all references together, (N,): their plain mean, whatever the area of each object."""
        return PriorMaps(self.positive.mean(0), self.peak.mean(0), self.negative.mean(0))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., c) of length one; those of length zero stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def mean_vectors(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (k, c) of vectors (N, c) under weights (k, N); a row without weight gives zeros."""
    return weights @ vectors / (weights.sum(1, keepdims=True) + MEAN_EPSILON * len(vectors))


def reference(features: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> dict[str, np.ndarray]:
    """What maps need to know of one reference: features (N, c), weights of the object and of its surroundings (N,).

    The mean of cosines to many cells is the cosine to the mean of their unit vectors, so two vectors stand for both
    mean maps. For the peak the cells themselves are needed, of the object alone. Keys, float32 unless noted:
    ``positive`` and ``negative`` (1, c); ``object`` (R, c), unit vectors times their weight; ``object_rows`` (1,)
    int64, how many rows of ``object`` are of this reference; ``prototype`` and ``counter_prototype`` (1, c), weighted
    means of the plain features inside and outside.
    """
    units = unit(features)
    weights = np.stack([inside, outside]).astype(np.float32)
    positive, negative = mean_vectors(units, weights)
    prototype, counter_prototype = mean_vectors(features, weights)
    kept = inside > 0
    rows = units[kept] * inside[kept, None]
    if not kept.all():  # the cells outside count as well, with product zero: one row stands for all of them
        rows = np.concatenate([rows, np.zeros_like(units[:1])])
    return {
        "positive": positive[None],
        "negative": negative[None],
        "object": rows.astype(np.float32),
        "object_rows": np.array([len(rows)]),
        "prototype": prototype[None],
        "counter_prototype": counter_prototype[None],
    }


def prior_maps(cosines: Callable[[np.ndarray], np.ndarray], references: Mapping[str, np.ndarray]) -> PriorMaps:
    """The maps of a query, one row for each reference.

    `cosines` gives the products (n, N) of rows (n, c) with the query's unit features; it is asked once. `references`
    holds the tensors of `reference`, concatenated over k references.
    """
    rows = [references[name] for name in ("positive", "negative", "object")]
    ends = np.cumsum([len(references["positive"]), len(references["negative"]), *references["object_rows"]])
    positive, negative, *objects = np.split(cosines(np.concatenate(rows)), ends[:-1])
    return PriorMaps(positive, np.stack([each.max(0) for each in objects]), negative)


def prompt_map(maps: PriorMaps) -> np.ndarray:
    """Where the object may be (N,), 0 to 1: mean times peak, and 0 where the surroundings fit better (merged maps)."""
    similar = _stretched(maps.positive * maps.peak)
    return np.where(_stretched(maps.negative) > similar, np.float32(0), similar)


def chosen_cells(prompts: np.ndarray, columns: int, most: int) -> np.ndarray:
    """Flat indices of the cells that become points, ordered by column, then row; at most `most`.

    As many as the map sums to, and one if it sums to less: the largest values, of equal ones the first.
    """
    total = float(prompts.sum(dtype=np.float32))
    count = min(int(total), most) or int(total > 0)
    best = np.argsort(-prompts, kind="stable")[:count]
    return best[np.lexsort((best // columns, best % columns))]


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low + np.float32(RANGE_EPSILON))
