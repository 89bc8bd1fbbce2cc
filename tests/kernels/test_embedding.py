"""Spectral embedding and k-means against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.cluster.vq import kmeans2

from fssdeploy.errors import InputError
from fssdeploy.kernels import embedding
from fssdeploy.kernels.embedding import kmeans, lloyd, spectral_embedding
from fssdeploy.kernels.spectral import spectral_edges

SOLVERS = [solver for solver in embedding.SOLVERS if solver != "auto"]


def three_groups(height: int = 9, width: int = 13, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Edges and degrees of a grid in three upright stripes of like features, and the stripe of every cell."""
    generator = torch.Generator().manual_seed(0)
    stripe = (torch.arange(width) * 3 // width).repeat(height)
    features = torch.randn(3, 64, generator=generator)[stripe] + 0.5 * torch.randn(len(stripe), 64, generator=generator)
    features = torch.nn.functional.normalize(features).to(dtype)
    labels, table = torch.zeros(len(stripe), dtype=torch.int64), torch.zeros(1, 1, dtype=dtype)
    evidence = torch.zeros(len(stripe), dtype=dtype)
    edges, degree = spectral_edges(features, labels, table, evidence, height, width, 2.0, "product", "clip")
    return edges, degree, stripe


def normalised(edges: torch.Tensor, degree: torch.Tensor) -> np.ndarray:
    scale = degree.double().numpy() ** -0.5
    return edges.double().numpy() * scale[:, None] * scale


def assert_eigenvectors(
    matrix: np.ndarray, values: torch.Tensor, vectors: torch.Tensor, tolerance: float = 1e-3
) -> None:
    """The leading values of a symmetric matrix, descending, with orthonormal vectors: any, where values are equal."""
    found, expected = vectors.double().numpy(), linalg.eigvalsh(matrix)[::-1][: len(values)]
    np.testing.assert_allclose(values.numpy(), expected, atol=tolerance)
    np.testing.assert_allclose(found.T @ found, np.eye(len(values)), atol=tolerance)
    np.testing.assert_allclose(matrix @ found, found * expected, atol=tolerance)


def same_partition(labels: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two clusterings agree up to the numbers of their clusters."""
    pairs = set(zip(labels.tolist(), expected.tolist(), strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(expected.tolist()))


@pytest.mark.parametrize("solver", embedding.SOLVERS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_solver_finds_the_leading_eigenvectors(solver: str, count: int) -> None:
    edges, degree, _ = three_groups()
    values, vectors = spectral_embedding(edges, degree, count, solver=solver)
    assert_eigenvectors(normalised(edges, degree), values, vectors)
    assert values[0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_random_walk(solver: str) -> None:
    edges, degree, _ = three_groups()
    values, vectors = spectral_embedding(edges, degree, 3, laplacian="random_walk", solver=solver)
    torch.testing.assert_close(edges / degree[:, None] @ vectors, vectors * values, atol=1e-4, rtol=1e-3)
    spread = vectors[:, 0].std() / vectors[:, 0].mean().abs()
    assert spread < 1e-3  # a walk has no favourite cell in its first vector


@pytest.mark.parametrize("solver", ["subspace", "dense", "scipy"])
@pytest.mark.parametrize(("height", "width", "count"), [(1, 1, 1), (1, 2, 2), (2, 3, 6), (1, 7, 3)])
def test_graphs_of_few_cells(solver: str, height: int, width: int, count: int) -> None:
    edges, degree, _ = three_groups(height, width)
    edges, degree = edges + torch.eye(len(edges)), degree + 1  # all eigenvalues far above zero
    values, vectors = spectral_embedding(edges, degree, count, solver=solver)
    assert_eigenvectors(normalised(edges, degree), values, vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_other_dtypes(dtype: torch.dtype, solver: str) -> None:
    edges, degree, _ = three_groups(dtype=dtype)
    values, vectors = spectral_embedding(edges, degree, 3, solver=solver)
    assert values.dtype == vectors.dtype == torch.promote_types(dtype, torch.float32)
    assert_eigenvectors(normalised(edges, degree), values, vectors)


def test_two_runs_give_the_same_bits() -> None:
    edges, degree, _ = three_groups()
    first, second = (spectral_embedding(edges, degree, 3, solver="subspace") for _ in range(2))
    assert torch.equal(first[1], second[1])


def test_groups_that_are_not_connected_share_an_eigenvalue() -> None:
    edges = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7), torch.ones(3, 3))
    for solver in ("subspace", "dense", "scipy"):
        values, vectors = spectral_embedding(edges, edges.sum(1), 3, solver=solver)
        torch.testing.assert_close(values, torch.ones(3), atol=1e-4, rtol=0)
        labels, _ = kmeans(torch.nn.functional.normalize(vectors), 3, seed=0)
        assert same_partition(labels, torch.tensor([0] * 5 + [1] * 7 + [2] * 3))


def test_subspace_iteration_declines_negative_eigenvalues() -> None:
    """A bipartite graph has -1 as its second largest magnitude: the block would turn there."""
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(40, 40, generator=generator)
    edges = torch.zeros(80, 80)
    edges[:40, 40:], edges[40:, :40] = half, half.T
    matrix = torch.from_numpy(normalised(edges, edges.sum(1)))
    assert embedding._subspace(-torch.eye(80), 2) is None
    found = embedding._solve(matrix, 2, embedding._chain("auto", torch.device("cuda")))
    assert_eigenvectors(matrix.numpy(), *found)


def test_auto_is_scipy_on_the_cpu_and_a_chain_of_solvers_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedding._chain("auto", torch.device("cpu")) == ("scipy",)
    assert embedding._chain("auto", torch.device("cuda")) == ("subspace", "lobpcg", "dense")
    assert embedding._chain("lobpcg", torch.device("cpu")) == ("lobpcg",)


def test_no_solver_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "TOLERANCE", 0.0)
    monkeypatch.setattr(embedding, "DENSE_LIMIT", 10)
    edges, degree, _ = three_groups()
    with pytest.raises(InputError, match="subspace, then lobpcg, then dense did not converge") as caught:
        embedding._solve(edges, 3, embedding._chain("auto", torch.device("cuda")))
    assert caught.value.code == "eigen_solver"
    with pytest.raises(InputError, match="lobpcg did not converge"):
        spectral_embedding(edges[:6, :6], degree[:6], 3, solver="lobpcg")  # its three blocks need nine cells


EDGES, DEGREE, _ = three_groups(2, 3)


@pytest.mark.parametrize(
    ("edges", "degree", "count", "options", "said"),
    [
        (EDGES[0], DEGREE, 1, {}, "edges has shape"),
        (EDGES[:3], DEGREE, 1, {}, "cells"),
        (EDGES, DEGREE[:3], 1, {}, "cells"),
        (EDGES.long(), DEGREE, 1, {}, "floating point"),
        (EDGES, DEGREE.to("meta"), 1, {}, "different devices"),
        (EDGES, DEGREE, 0, {}, "0 vectors are wanted"),
        (EDGES, DEGREE, 7, {}, "7 vectors are wanted"),
        (EDGES / 0, DEGREE, 1, {}, "finite"),
        (EDGES.triu(), DEGREE, 1, {}, "directed"),
        (EDGES, DEGREE, 1, {"laplacian": "none"}, "laplacian cannot be 'none'"),
        (EDGES, DEGREE, 1, {"solver": "arpack"}, "solver cannot be 'arpack'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_graphs_that_cannot_be_embedded(
    edges: torch.Tensor, degree: torch.Tensor, count: int, options: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        spectral_embedding(edges, degree, count, **options)
    assert caught.value.code == "kernel_input"


@pytest.mark.parametrize("solver", ["auto", "subspace"])
def test_stripes_are_found_again(solver: str) -> None:
    edges, degree, stripe = three_groups()
    _, vectors = spectral_embedding(edges, degree, 3, solver=solver)
    labels, _ = kmeans(torch.nn.functional.normalize(vectors), 3, seed=0)
    assert same_partition(labels, stripe)


def blobs(clusters: int, each: int = 20, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(clusters)
    centres = 10 * torch.eye(8)[:clusters, :5] + torch.arange(clusters)[:, None]
    points = centres.repeat_interleave(each, 0) + 0.3 * torch.randn(clusters * each, 5, generator=generator)
    return points.to(dtype), torch.arange(clusters).repeat_interleave(each)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("clusters", [1, 2, 5, 8])
def test_blobs_are_found_again(clusters: int, dtype: torch.dtype) -> None:
    points, expected = blobs(clusters, dtype=dtype)
    labels, centres = kmeans(points, clusters, seed=3)
    assert same_partition(labels, expected)
    assert (labels.dtype, centres.dtype, centres.shape) == (torch.int64, dtype, (clusters, 5))
    for cluster in range(clusters):
        mean = points[labels == cluster].double().mean(0)
        torch.testing.assert_close(centres[cluster].double(), mean, rtol=1e-2, atol=1e-2)


def test_rounds_agree_with_scipy() -> None:
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = torch.stack([points[:5], points[20:25]])
    for rounds in (1, 3, 100):
        labels, centres = lloyd(points, starts, rounds)
        for start in range(2):
            expected, expected_labels = kmeans2(points.numpy(), starts[start].numpy(), iter=rounds, minit="matrix")
            np.testing.assert_allclose(centres[start].numpy(), expected)
            if rounds == 100:
                np.testing.assert_array_equal(labels[start].numpy(), expected_labels)


def test_a_cluster_without_points_keeps_its_centre() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0]])
    labels, centres = lloyd(points, torch.tensor([[[0.5], [10.0], [99.0]]]), 10)
    assert labels.tolist() == [[0, 0, 1]]
    assert centres[0, :, 0].tolist() == [0.5, 10.0, 99.0]


def test_fewer_different_points_than_clusters() -> None:
    points = torch.tensor([[1.0, 2.0]] * 4 + [[3.0, 4.0]])
    labels, centres = kmeans(points, 3, seed=0)
    assert same_partition(labels, torch.tensor([0, 0, 0, 0, 1]))
    assert torch.equal(centres[labels], points)


def test_as_many_clusters_as_points() -> None:
    points = torch.arange(5.0)[:, None]
    labels, _ = kmeans(points, 5, seed=0)
    assert sorted(labels.tolist()) == list(range(5))


def test_the_seed_decides() -> None:
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    first, again, other = (kmeans(points, 12, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("points", "clusters", "said"),
    [
        (torch.zeros(3), 1, "points has shape"),
        (torch.zeros(3, 1, dtype=torch.int64), 1, "floating point"),
        (torch.zeros(3, 1), 0, "0 clusters are wanted"),
        (torch.zeros(3, 1), 4, "4 clusters are wanted"),
        (torch.full((3, 1), torch.nan), 1, "finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_points_that_cannot_be_clustered(points: torch.Tensor, clusters: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        kmeans(points, clusters, seed=0)
    assert caught.value.code == "kernel_input"
