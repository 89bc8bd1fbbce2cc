"""The Triton kernel of the graph, in Triton's interpreter (run by test_interpreter.py), against the NumPy host."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fssdeploy.glue.gsm import graph
from fssdeploy.kernels import dispatch, runtime, spectral
from fssdeploy.kernels.spectral import BROADCASTS, NEGATIVES, spectral_edges

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = 16


class Launches:
    """Stands in for the kernel: runs it, and counts launches by their constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.constants = kernel, Counter[tuple[bool, bool]]()
        self.grid: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.grid = grid
            self.constants[constants["SYMMETRIC"], constants["UP"]] += 1
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts launches; every tensor that a launcher allocates is full of NaN, and tiles are small."""
    counter = Launches(spectral._edges_kernel)
    monkeypatch.setattr(spectral, "_edges_kernel", counter)
    monkeypatch.setattr(spectral, "TILE", SMALL)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    return counter


def graph_inputs(cells: int, channels: int = 64, dtype: torch.dtype = torch.float32, regions: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(cells)
    features, means = (torch.randn(n, channels, generator=generator) for n in (cells, regions))
    features, means = (torch.nn.functional.normalize(rows) for rows in (features, means))
    labels = torch.randint(0, regions, (cells,), generator=generator)
    return (
        features.to(dtype),
        labels,
        (means @ means.T).to(dtype),
        (0.4 * torch.randn(cells, generator=generator)).to(dtype),
    )


def assert_like_the_host(
    inputs: Inputs, height: int, width: int, sigma: float, broadcast: str, negative: str
) -> tuple[torch.Tensor, torch.Tensor]:
    edges, degree = spectral_edges(*inputs, height, width, sigma, broadcast, negative)
    assert dispatch.taken()["spectral_edges"].implementation == "triton"
    features, labels, table, evidence = (tensor.double().numpy() for tensor in inputs)
    expected = graph.edge_weights(
        features @ features.T, (height, width), labels.astype(int), table, np.exp(evidence),
        sigma=sigma, broadcast=broadcast, negative=negative,
    )  # fmt: skip
    tolerance = TOLERANCES[edges.dtype]
    np.testing.assert_allclose(edges.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    # Degrees are summed before edges are rounded.
    np.testing.assert_allclose(degree.double().numpy(), expected.sum(1), rtol=5e-6, atol=5e-6 * len(expected))
    assert (edges.dtype, degree.dtype) == (inputs[0].dtype, torch.float32)
    return edges, degree


@pytest.mark.parametrize(("broadcast", "negative"), list(itertools.product(BROADCASTS, NEGATIVES)))
def test_every_mode(launches: Launches, broadcast: str, negative: str) -> None:
    edges, _ = assert_like_the_host(graph_inputs(21), 3, 7, 1.5, broadcast, negative)
    symmetric = broadcast not in ("row", "column")
    assert launches.constants == {(symmetric, False): 1}
    assert launches.grid == ((3, 1) if symmetric else (2, 2))
    assert torch.equal(edges, edges.T) == symmetric


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (4, 4), (1, 17), (1, 31), (3, 11), (7, 7)], ids=str)
@pytest.mark.parametrize("broadcast", ["product", "row"])
def test_sizes_around_tiles(launches: Launches, height: int, width: int, broadcast: str) -> None:
    assert_like_the_host(graph_inputs(height * width), height, width, 2.0, broadcast, "shift")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("broadcast", ["geometric", "column"])
def test_half_precision(launches: Launches, dtype: torch.dtype, broadcast: str) -> None:
    assert_like_the_host(graph_inputs(21, dtype=dtype), 7, 3, 2.0, broadcast, "exp")
    assert launches.constants == {(broadcast == "geometric", dtype == torch.bfloat16): 1}


@pytest.mark.parametrize("channels", [1, 63, 100, 192])
def test_channels_are_filled_up(launches: Launches, channels: int) -> None:
    assert_like_the_host(graph_inputs(6, channels=channels), 2, 3, 2.0, "product", "clip")


def test_the_tiles_that_are_launched_on_a_gpu() -> None:
    for broadcast, dtype in (("mean", torch.float32), ("row", torch.float16)):
        assert_like_the_host(graph_inputs(65, dtype=dtype), 5, 13, 2.0, broadcast, "keep")


def test_strides_and_misaligned_addresses(launches: Launches) -> None:
    features, labels, table, evidence = (torch.cat([tensor[:1], tensor])[1:] for tensor in graph_inputs(21))
    strided = torch.stack([features] * 2, -1)[..., 1]
    assert not strided.is_contiguous()
    assert_like_the_host((strided, labels, table, evidence), 3, 7, 2.0, "product", "shift")


def test_cells_without_features(launches: Launches) -> None:
    inputs = graph_inputs(21)
    inputs[0][::2] = 0
    edges, _ = assert_like_the_host(inputs, 3, 7, 2.0, "none", "clip")
    assert not edges[::2].any()


def test_parameters_in_single_precision(launches: Launches) -> None:
    features, labels, table, evidence = graph_inputs(21)
    assert_like_the_host((features.half(), labels, table, evidence), 3, 7, 2.0, "mean", "shift")


def test_two_runs_give_the_same_bits(launches: Launches) -> None:
    inputs = graph_inputs(35, dtype=torch.float16)
    for first, second in zip(*(spectral_edges(*inputs, 5, 7, 2.0) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_gradients_do_not_depend_on_the_implementation(launches: Launches) -> None:
    features, labels, table, evidence = graph_inputs(15)
    gradients = []
    for dtype in (torch.float32, torch.float64):  # the kernel does not take float64
        f, t, e = (tensor.to(dtype).requires_grad_() for tensor in (features, table, evidence))
        edges, degree = spectral_edges(f, labels, t, e, 3, 5, 2.0)
        gradients.append(torch.autograd.grad(edges.square().sum() + degree.sum(), (f, t, e)))
    assert launches.constants.total() == 1
    for mine, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_float64_runs_as_reference_and_says_so(launches: Launches) -> None:
    spectral_edges(*graph_inputs(6, dtype=torch.float64), 2, 3, 2.0)
    choice = dispatch.taken()["spectral_edges"]
    assert (choice.implementation, not launches.constants) == ("reference", True)
    assert "float64" in choice.reason


@pytest.mark.slow
def test_a_real_size() -> None:
    assert_like_the_host(graph_inputs(37 * 37, channels=768, dtype=torch.float16), 37, 37, 2.0, "product", "shift")
