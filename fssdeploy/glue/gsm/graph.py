"""The graph over the cells of the query and its spectral clustering (GSM, equations (2), (3), (6), (7)).

Of the N x N matrices of the text only the cosines C and the edges E exist; the Gaussian is separable, the region
affinity is a look-up in a small table, and both are applied to one grid row of E at a time. No torch.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg
from scipy.sparse.linalg import ArpackError, eigsh

from fssdeploy.glue.gfsam.maps import unit
from fssdeploy.glue.gsm.regions import numbered

# Only the leading directions are wanted, and labels change where vectors differ by far more than this.
TOLERANCE = 1e-4
# A full decomposition costs N^3: beyond this it takes longer than the host itself.
DENSE_LIMIT = 2048
MIN_DEGREE = 1e-30


class SolverFailureError(Exception):
    """The eigenvectors of a graph could not be found; the caller goes on without the clustering."""


def cosine_matrix(units: np.ndarray) -> np.ndarray:
    """Equation (2) read as cosines: unit features (N, c) to float32 (N, N)."""
    return units @ units.T


def gaussian(count: int, sigma: float) -> np.ndarray:
    """Equation (3) along one side of the grid, float32 (count, count); the kernel of two cells is the product."""
    index = np.arange(count)
    return np.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2)).astype(np.float32)


def without_negatives(cosines: np.ndarray, rule: str) -> np.ndarray:
    """What an edge makes of cosines: "shift" (1+c)/2, "clip" at 0, "exp" exp(c-1), "keep" as they are."""
    if rule == "shift":
        return (cosines + 1) * np.float32(0.5)
    if rule == "clip":
        return np.maximum(cosines, 0)
    return np.exp(cosines - 1) if rule == "exp" else cosines


def edge_weights(
    cosines: np.ndarray,
    grid: tuple[int, int],
    labels: np.ndarray,
    table: np.ndarray,
    reference: np.ndarray,
    *,
    sigma: float,
    negative: str,
    broadcast: str,
) -> np.ndarray:
    """Equation (6): E = C' * (K + D') * B(g), float32 (N, N).

    `cosines` (N, N); `labels` (N,) the regions of the cells, `table` (l, l) their similarity; `reference` (N,) the
    term g = exp(S+ - S-). `broadcast` says what g does to an edge from i to j: "product" g_i g_j, "geometric" its
    root, "mean" their mean, "row" g_i, "column" g_j, "none" nothing.
    """
    rows, columns = grid
    down, across = gaussian(rows, sigma), gaussian(columns, sigma)
    seen_from = without_negatives(table, negative)[:, labels]  # (l, N)
    if broadcast == "geometric":
        reference = np.sqrt(reference)
    edges = np.empty_like(cosines)
    for row in range(rows):
        here = slice(row * columns, (row + 1) * columns)
        block = (across[:, None, :] * down[row, :, None]).reshape(columns, -1)
        block += seen_from[labels[here]]
        block *= without_negatives(cosines[here], negative)
        if broadcast == "mean":
            block *= (reference[here, None] + reference) * np.float32(0.5)
        if broadcast in ("product", "geometric", "row"):
            block *= reference[here, None]
        if broadcast in ("product", "geometric", "column"):
            block *= reference
        edges[here] = block
    return edges


def undirected(broadcast: str) -> str:
    """The broadcast whose E equals (E + E^T)/2 of the given one: halves of a row and a column are the mean."""
    return "mean" if broadcast in ("row", "column") else broadcast


def normalise(edges: np.ndarray, *, keep_diagonal: bool) -> np.ndarray:
    """Turn a symmetric E into D^-1/2 E D^-1/2 **in place** (Ng et al.); returns the degrees, float32 (N,)."""
    if not keep_diagonal:
        np.fill_diagonal(edges, 0)
    degree: np.ndarray = edges.sum(1)
    scale = 1 / np.sqrt(np.maximum(degree, MIN_DEGREE))
    edges *= scale[:, None]
    edges *= scale
    return degree


def leading_eigenvectors(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues, descending, and their vectors (N, count), of a symmetric float32 matrix.

    Lanczos from a fixed start; a full decomposition where that does not converge and N is at most 2048.
    SolverFailureError if neither gives finite vectors.
    """
    values, vectors = _lanczos(matrix, count) or _dense_eigenvectors(matrix, count)
    descending = np.argsort(-values, kind="stable")
    return values[descending], vectors[:, descending]


def _lanczos(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """None where it does not converge, or the matrix is too small for it."""
    size = matrix.shape[0]
    if count >= size // 2:
        return None
    start = np.random.default_rng(0).standard_normal((size,), np.float32)
    try:
        values, vectors = eigsh(matrix, count, which="LA", v0=start, tol=TOLERANCE)
    except ArpackError:
        return None
    return (values, vectors) if np.isfinite(vectors).all() else None


def _dense_eigenvectors(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    size = matrix.shape[0]
    count = min(count, size)
    if size > DENSE_LIMIT:
        raise SolverFailureError(f"the eigen-solver did not converge, and {size} cells are too many for a full solve")
    if not np.isfinite(matrix).all():
        raise SolverFailureError("the graph has edges that are no finite numbers")
    try:
        return linalg.eigh(matrix, subset_by_index=(size - count, size - 1))
    except linalg.LinAlgError as error:
        raise SolverFailureError(f"the full eigen-decomposition failed: {error}") from error


def cluster(
    vectors: np.ndarray, degree: np.ndarray, *, assign: str, laplacian: str, normalise_rows: bool
) -> np.ndarray:
    """Cells to as many clusters as there are vectors: int32 (N,), numbered by first occurrence.

    `assign`: "pivoted_qr", "kmeans" or, for two vectors, "sign" of the second. `laplacian` "random_walk" divides the
    rows of `vectors` (N, m) by the root of their degree. Rows are brought to length 1 for k-means only: with the
    pivots of a QR all lengths would tie.
    """
    if laplacian == "random_walk":
        vectors = vectors / np.sqrt(np.maximum(degree, MIN_DEGREE))[:, None]
    if assign == "sign":
        return numbered(vectors[:, 1] > 0)
    if assign == "kmeans":
        return numbered(_kmeans(unit(vectors) if normalise_rows else vectors))
    return numbered(_pivoted_qr(vectors))


def _pivoted_qr(vectors: np.ndarray) -> np.ndarray:
    """One representative cell a cluster by pivoted QR; every cell joins the one it is most aligned with.

    The polar factor of the representatives' rows rotates them next to the axes, so the result depends neither on the
    sign nor on the rotation of the eigenvectors, nor on chance.
    """
    _, pivots = linalg.qr(vectors.T, mode="r", pivoting=True)
    left, _, right = linalg.svd(vectors[pivots[: vectors.shape[1]]].T)
    return np.abs(vectors @ (left @ right)).argmax(1)


def _kmeans(points: np.ndarray, rounds: int = 300) -> np.ndarray:
    """Lloyd's k-means, k = number of columns, without chance: every centre starts as the row farthest from the others.

    The first is the row farthest from the mean. A centre that loses all its rows stays where it was.
    """
    distance = np.square(points - points.mean(0)).sum(1)
    centres = points[[distance.argmax()]]
    while len(centres) < points.shape[1]:
        nearest = np.square(points[:, None] - centres).sum(2).min(1)
        centres = np.vstack([centres, points[nearest.argmax()]])
    labels = np.full(len(points), -1)
    for _ in range(rounds):
        closest = np.square(points[:, None] - centres).sum(2).argmin(1)
        if (closest == labels).all():
            break
        labels = closest
        for number in np.unique(labels):
            centres[number] = points[labels == number].mean(0)
    return labels
