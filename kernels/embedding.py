"""Cells along the leading eigenvectors of their graph, and k-means among them (Ng et al., 2002; GSM, equation (7)).

No Triton: a dozen products with a thin block, a Cholesky factor and a small eigenproblem are linear algebra that the
device has already. On the CPU SciPy's Lanczos does it, as in fssdeploy.glue.gsm.graph. Nothing here has gradients.
"""

from __future__ import annotations

import torch

from fssdeploy.errors import InputError
from fssdeploy.kernels import contract

LAPLACIANS = ("symmetric", "random_walk")
SOLVERS = ("auto", "subspace", "lobpcg", "dense", "scipy")
# A vector v with value t is found when |A v - t v| is below this; the values lie in [-1, 1].
TOLERANCE = 1e-4
# Vectors iterated beside those that are wanted: the next eigenvalue decides how fast the block converges.
GUARDS = 8
# Products between looks at the residual, which wait for the device; and products before giving up.
PRODUCTS_A_LOOK, MOST_PRODUCTS = 4, 120
# A full decomposition costs N^3.
DENSE_LIMIT = 8192
MIN_DEGREE = 1e-30
# Added to the diagonal of a Gram matrix of unit columns, so that its Cholesky factor exists in float32.
SHIFT = 1e-6


@torch.no_grad()
def spectral_embedding(
    edges: torch.Tensor,
    degree: torch.Tensor,
    count: int,
    *,
    laplacian: str = "symmetric",
    solver: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues of D^-1/2 E D^-1/2, descending (count,), and their vectors (N, count).

    `edges` (N, N) symmetric, `degree` (N,) its row sums, as from `spectral_edges`; computed and returned in float32
    (float64 for float64). Vectors are orthonormal with any sign; "random_walk" gives those of D^-1 E instead, rows
    divided by the root of their degree. `solver`: "subspace" block subspace iteration, "lobpcg", "dense", all three on
    the device, "scipy" on the CPU; "auto" is SciPy for tensors of the CPU, else subspace iteration and, where that does
    not converge, the other two.

    InputError (kernel_input) for tensors that do not belong together, edges that are not finite or not symmetric and
    `count` outside of 1 to N; InputError (eigen_solver) where no solver finds the vectors.
    """
    _check(edges, degree, count, laplacian, solver)
    wide = torch.promote_types(edges.dtype, torch.float32)
    scale = degree.to(wide).clamp_min(MIN_DEGREE).rsqrt()
    matrix = edges.to(wide) * scale[:, None] * scale
    values, vectors = _solve(matrix, count, _chain(solver, matrix.device))
    return values, vectors * scale[:, None] if laplacian == "random_walk" else vectors


def _check(edges: torch.Tensor, degree: torch.Tensor, count: int, laplacian: str, solver: str) -> None:
    name = "spectral_embedding"
    contract.require_rank(name, edges=(edges, 2), degree=(degree, 1))
    contract.require_alike(name, edges=edges, degree=degree.to(edges.dtype))
    contract.require_equal(name, "cells", rows=len(edges), columns=edges.shape[1], degree=len(degree))
    if not 1 <= count <= len(edges):
        contract.refuse(name, f"{count} vectors are wanted", f"a graph of {len(edges)} cells has 1 to {len(edges)}")
    for option, value, choices in (("laplacian", laplacian, LAPLACIANS), ("solver", solver, SOLVERS)):
        if value not in choices:
            contract.refuse(name, f"{option} cannot be '{value}'", "", f"Choose {' or '.join(choices)}.")
    largest = edges.abs().max()
    if not largest.isfinite():
        contract.refuse(name, "there are edges that are no finite numbers")
    if (edges - edges.T).abs().max() > 1e-2 * largest:
        fix = 'Build it with broadcast="mean": that is the symmetric part of "row" and of "column".'
        contract.refuse(name, "the graph is directed", "its eigenvectors are not orthogonal", fix)


def _chain(solver: str, device: torch.device) -> tuple[str, ...]:
    """The solvers to try, one after the other."""
    if solver != "auto":
        return (solver,)
    return ("scipy",) if device.type == "cpu" else ("subspace", "lobpcg", "dense")


def _solve(matrix: torch.Tensor, count: int, chain: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    solvers = {"subspace": _subspace, "lobpcg": _lobpcg, "dense": _dense, "scipy": _scipy}
    for solver in chain:
        found = solvers[solver](matrix, count)
        if found is not None:
            return found
    what, why = "the eigenvectors of the graph were not found", f"{', then '.join(chain)} did not converge"
    raise InputError("eigen_solver", what, why, "Go on without the clustering.")


def _scipy(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The solver of the host: Lanczos, and a full decomposition of a small graph."""
    from fssdeploy.glue.gsm.graph import SolverFailureError, leading_eigenvectors

    try:
        values, vectors = leading_eigenvectors(matrix.detach().cpu().numpy(), count)
    except SolverFailureError:
        return None
    return torch.as_tensor(values).to(matrix), torch.as_tensor(vectors).to(matrix)


def _dense(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if len(matrix) > DENSE_LIMIT:
        return None
    values, vectors = torch.linalg.eigh(matrix)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def _lobpcg(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if len(matrix) < 3 * count:  # it iterates in a space of three blocks
        return None
    try:
        values, vectors = torch.lobpcg(
            matrix, X=_start(matrix, count), largest=True, niter=MOST_PRODUCTS, tol=TOLERANCE / 10
        )
    except (RuntimeError, torch.linalg.LinAlgError):  # a block that lost its rank
        return None
    return (values, vectors) if _residual(matrix @ vectors, values, vectors) < TOLERANCE else None


def _subspace(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Block subspace iteration; None if it did not converge, or to values of which some are not positive.

    A block turns towards the values that are largest in magnitude. If all that are wanted are positive, nothing larger
    is left outside of it.
    """
    block = _orthonormal(_start(matrix, min(count + GUARDS, len(matrix))))
    for _ in range(MOST_PRODUCTS // PRODUCTS_A_LOOK):
        for _ in range(PRODUCTS_A_LOOK - 1):
            block = _orthonormal(matrix @ block)
        image = matrix @ block
        values, rotation = torch.linalg.eigh(block.T @ image)
        values, rotation = values.flip(0), rotation.flip(1)  # descending
        block, image = block @ rotation, image @ rotation
        wanted, found = values[:count], block[:, :count]
        if _residual(image[:, :count], wanted, found) < TOLERANCE:
            return (wanted, found) if wanted[-1] > TOLERANCE else None
        block = _orthonormal(image)
    return None


def _start(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The same random block (N, count) on every device."""
    block = torch.randn(len(matrix), count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return block.to(matrix)


def _orthonormal(block: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns, by Cholesky factors of their products; it never waits for the device."""
    for _ in range(3):  # each time the columns are nearer to orthogonal, and the factor more exact
        block = block / block.norm(dim=0).clamp_min(MIN_DEGREE)
        products = block.T @ block
        products.diagonal().add_(SHIFT)
        factor = torch.linalg.cholesky_ex(products).L
        block = torch.linalg.solve_triangular(factor, block.T, upper=False).T
    return block


def _residual(image: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> float:
    """How far A v is from t v and the vectors are from orthonormal, whichever is more; not finite counts as far."""
    turned = (image - vectors * values).norm(dim=0).max()
    identity = torch.eye(len(values), dtype=vectors.dtype, device=vectors.device)
    skew = (vectors.T @ vectors - identity).abs().max()
    return float(torch.maximum(turned, skew).nan_to_num(torch.inf))


# Starts tried side by side, and rounds before the best of them is taken as it is.
RESTARTS, ROUNDS = 8, 300


@torch.no_grad()
def kmeans(points: torch.Tensor, clusters: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's k-means of points (N, D): the cluster of each point (N,) int64, and the centres (clusters, D).

    The best of 8 starts by k-means++ (Arthur & Vassilvitskii, 2007), all on the device of `points`; a start depends on
    `seed` alone, so two runs agree. A cluster that loses its last point keeps its centre. InputError (kernel_input)
    for points that are not finite, or `clusters` outside of 1 to N.
    """
    contract.require_rank("kmeans", points=(points, 2))
    contract.require_alike("kmeans", points=points)
    if not 1 <= clusters <= len(points):
        contract.refuse("kmeans", f"{clusters} clusters are wanted", f"there are {len(points)} points")
    if not points.isfinite().all():
        contract.refuse("kmeans", "there are points that are no finite numbers")
    wide = points.to(torch.promote_types(points.dtype, torch.float32))
    labels, centres = lloyd(wide, _plus_plus(wide, clusters, seed), ROUNDS)
    spread = _squared_distances(wide, centres).amin(2).sum(1)
    best = spread.argmin()
    return labels[best], centres[best].to(points.dtype)


def lloyd(points: torch.Tensor, centres: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From several starts (R, k, D) to the labels (R, N) of points (N, D) and the centres (R, k, D) after `rounds`.

    It ends earlier when no label changes. A point in the middle of two centres belongs to the first.
    """
    labels = _squared_distances(points, centres).argmin(2)
    for _ in range(rounds):
        member = torch.nn.functional.one_hot(labels, centres.shape[1]).to(points.dtype)  # a product has a fixed order
        sizes = member.sum(1)[..., None]
        centres = torch.where(sizes > 0, member.mT @ points / sizes.clamp_min(1), centres)
        before, labels = labels, _squared_distances(points, centres).argmin(2)
        if torch.equal(before, labels):
            break
    return labels, centres


def _plus_plus(points: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """Centres (R, k, D): each a point drawn with a chance proportional to its squared distance to those before it.

    The largest of log chance + Gumbel noise is such a draw, and needs no cumulated sum.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(clusters, RESTARTS, len(points), dtype=torch.float64, generator=generator)
    noise = -torch.log(-torch.log(noise.clamp_min(1e-300))).to(points)
    centres = points[noise[0].argmax(1)][:, None]
    for draw in noise[1:]:
        distance = _squared_distances(points, centres).amin(2)
        centres = torch.cat([centres, points[(distance.log() + draw).argmax(1)][:, None]], 1)
    return centres


def _squared_distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(R, N, k); differences are squared, not expanded, so that equal points are at distance 0."""
    return (points[None, :, None] - centres[:, None]).square().sum(3)
