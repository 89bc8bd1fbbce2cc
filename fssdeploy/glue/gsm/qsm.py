"""Query-specific semantic modeling: which cells of the query are foreground by the query's own structure (GSM).

Equations (2) to (8): edges cut the picture into regions; a graph that mixes features, nearness, regions and the
references' evidence is cut into m finer regions; the same graph with those is cut in two. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fssdeploy.glue.gsm.graph import (
    cluster,
    edge_weights,
    leading_eigenvectors,
    normalise,
    undirected,
)
from fssdeploy.glue.gsm.options import GsmOptions
from fssdeploy.glue.gsm.regions import edge_regions, edge_strength, edge_threshold, numbered, region_similarity

AUTO_GAIN = 0.75
AUTO_SIGMA = 2.0
SIGMA_GRID = 37
# Evidence flatter than this is rounding noise, which the automatic gain would blow up.
FLAT = 1e-6
# Cells further than e^-30 below the best are all alike to a float32 graph; keeps products of two in range.
LOWEST_EXPONENT = -30.0


def gain_of(evidence: np.ndarray, options: GsmOptions) -> float:
    """The factor inside the exponential of equation (6); 0 where the evidence is the same everywhere."""
    if options.gain != "auto":
        return float(options.gain)
    spread = float(evidence.std(dtype=np.float64))
    return AUTO_GAIN / spread if spread > FLAT else 0.0


def sigma_of(grid: tuple[int, int], options: GsmOptions) -> float:
    """The width of the Gaussian in cells."""
    if options.sigma != "auto":
        return float(options.sigma)
    return AUTO_SIGMA * max(1.0, max(grid) / SIGMA_GRID)


def reference_term(evidence: np.ndarray, gain: float) -> np.ndarray:
    """exp(gain (S+ - S-)) of equation (6), float32 (N,), divided by its largest value.

    The divisor is the same for every edge, so it leaves the normalised graph as it is.
    """
    exponent = gain * (evidence.astype(np.float64) - evidence.max())
    return np.exp(np.maximum(exponent, LOWEST_EXPONENT)).astype(np.float32)


def mine_query(
    picture: np.ndarray,
    units: np.ndarray,
    cosines: np.ndarray,
    grid: tuple[int, int],
    evidence: np.ndarray,
    host_mask: np.ndarray,
    options: GsmOptions,
    trace: dict[str, Any],
) -> np.ndarray | None:
    """m_qsm of equation (8): bool (N,), or None if everything fell into one cluster.

    `picture` uint8 (H, W, 3) as the host sees it, `units` (N, c) unit features of its cells and `cosines` (N, N) their
    products, `evidence` (N,) is S+ - S-, `host_mask` bool (N,). SolverFailureError if no eigenvectors were found.
    """
    strength = edge_strength(picture, grid, options.edge_resize)
    threshold = edge_threshold(strength, options.edge_threshold)
    coarse = edge_regions(strength, threshold, options.edge_cells, options.connectivity).ravel()
    gain = gain_of(evidence, options)
    graph = _Graph(units, cosines, grid, reference_term(evidence, gain), options, trace)
    trace |= {
        "edge_grid": strength,
        "edge_threshold": threshold,
        "region_labels": coarse,
        "evidence": evidence,
        "gain": gain,
        "reference_term": graph.reference,
    }
    fine = graph.split(coarse, min(options.regions, len(units)), options.assign, "_1")
    if options.binary == "evidence":
        halves = numbered(_means(evidence, fine)[fine] > 0)
    else:
        halves = graph.split(fine, 2, options.assign_binary, "_2")
    if halves.max() == 0:
        return None
    chosen = halves == _foreground(halves, evidence, host_mask, options.foreground)
    trace |= {"labels_2": halves, "m_qsm": chosen}
    return chosen


@dataclass
class _Graph:
    """The cells of one query with all that an edge needs but the regions."""

    units: np.ndarray
    cosines: np.ndarray
    grid: tuple[int, int]
    reference: np.ndarray
    options: GsmOptions
    trace: dict[str, Any]

    def split(self, regions: np.ndarray, count: int, assign: str, step: str) -> np.ndarray:
        """Equations (5) to (7): from regions to `count` clusters, int32 (N,)."""
        options = self.options
        table = region_similarity(self.units, regions)
        edges = edge_weights(
            self.cosines,
            self.grid,
            regions,
            table,
            self.reference,
            sigma=sigma_of(self.grid, options),
            negative=options.negative,
            broadcast=undirected(options.broadcast),
        )
        degree = normalise(edges, keep_diagonal=options.keep_diagonal)
        values, vectors = leading_eigenvectors(edges, count)
        labels = cluster(
            vectors, degree, assign=assign, laplacian=options.laplacian, normalise_rows=options.normalise_rows
        )
        self.trace |= {
            f"region_similarity{step}": table,
            f"degree{step}": degree,
            f"eigenvalues{step}": values,
            f"eigenvectors{step}": vectors,
            f"labels{step}": labels,
        }
        return labels


def _means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, values) / np.bincount(labels)


def _foreground(halves: np.ndarray, evidence: np.ndarray, host_mask: np.ndarray, rule: str) -> int:
    """Which of two clusters is the object; the first wins a tie."""
    if rule == "smaller":
        return int(np.argmin(np.bincount(halves)))
    return int(np.argmax(_means(evidence if rule == "evidence" else host_mask, halves)))
