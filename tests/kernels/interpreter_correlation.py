"""The Triton kernel of correlation, ReLU and projection, in Triton's interpreter (run by test_interpreter.py)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fssdeploy.kernels import correlation, dispatch, runtime
from fssdeploy.kernels.correlation import correlation_projection

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Launches:
    """Stands in for the kernel: runs it, and counts launches by width and upcast."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.constants = kernel, Counter[tuple[int, bool]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.constants[constants["WIDTH"], constants["UP"]] += 1
            self.kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Counts launches; every tensor that the launcher allocates is full of NaN."""
    counter = Launches(correlation._correlation_projection_kernel)
    monkeypatch.setattr(correlation, "_correlation_projection_kernel", counter)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    return counter


@pytest.fixture
def small(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Tiles of 16 rows, 16 or 32 outputs, 32 or 16 support rows."""
    monkeypatch.setattr(correlation, "ROWS", 16)
    tile = (32, "ieee", {16: 32, 32: 16})
    monkeypatch.setattr(correlation, "TILES", {2: tile, 4: tile})
    return launches


def projection_inputs(
    shots: int, queries: int, cells: int, channels: int, outputs: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(queries + cells)
    query, support = (
        torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
        for shape in ((queries, channels), (shots, cells, channels))
    )
    projection = torch.randn(shots, cells, outputs, generator=generator) / cells**0.5
    return query.to(dtype), support.to(dtype), projection.to(dtype)


def assert_exact(inputs: Inputs) -> torch.Tensor:
    found = correlation_projection(*inputs)
    assert dispatch.taken()["correlation_projection"].implementation == "triton"
    query, support, projection = (tensor.double() for tensor in inputs)
    expected = torch.einsum("qc,ksc->kqs", query, support).clamp_min(0) @ projection
    assert found.dtype == inputs[0].dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCES[found.dtype], atol=TOLERANCES[found.dtype])
    return found


@pytest.mark.parametrize(
    ("shots", "queries", "cells", "outputs"),
    [
        (1, 1, 1, 1),
        (1, 15, 31, 3),
        (2, 16, 32, 16),
        (5, 17, 33, 5),
        (1, 37, 67, 17),
        (2, 3, 17, 32),
        (1, 5, 7, 33),
        (1, 2, 3, 97),
    ],
)
def test_sizes_around_tiles(small: Launches, shots: int, queries: int, cells: int, outputs: int) -> None:
    assert_exact(projection_inputs(shots, queries, cells, 64, outputs))
    assert small.constants == {(16 if outputs <= 16 else 32, False): 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(small: Launches, dtype: torch.dtype) -> None:
    assert_exact(projection_inputs(2, 19, 41, 64, 7, dtype))
    assert small.constants == {(16, dtype == torch.bfloat16): 1}


@pytest.mark.parametrize("channels", [1, 63, 100, 192])
def test_channels_are_filled_up(small: Launches, channels: int) -> None:
    assert_exact(projection_inputs(1, 5, 7, channels, 3))


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(dtype, width) for dtype in (torch.float16, torch.float32) for width in correlation.TILES[dtype.itemsize][2]],
)
def test_the_tiles_that_are_launched_on_a_gpu(launches: Launches, dtype: torch.dtype, width: int) -> None:
    assert_exact(projection_inputs(1, 3, 65, 64, width - 1, dtype))
    assert launches.constants == {(width, False): 1}


def test_strides_and_misaligned_addresses(small: Launches) -> None:
    query, support, projection = (torch.cat([tensor[:1], tensor])[1:] for tensor in projection_inputs(2, 5, 7, 64, 32))
    strided = torch.stack([support] * 2, -1)[..., 1]
    assert not strided.is_contiguous()
    assert_exact((query, strided, projection.mT.contiguous().mT))


def test_masked_rows_and_zero_features_add_nothing(small: Launches) -> None:
    query, support, projection = projection_inputs(2, 5, 19, 64, 3)
    query[2], projection[1] = 0, 0
    found = assert_exact((query, support, projection))
    assert not found[1].any()
    assert not found[:, 2].any()
    assert found[0, 0].all()


def test_negative_correlations_count_as_zero(small: Launches) -> None:
    query, support, projection = projection_inputs(1, 5, 1, 64, 3)
    assert not assert_exact((-support[0], support, projection)).any()
    assert assert_exact((support[0], support, projection)).all()


def test_two_runs_give_the_same_bits(small: Launches) -> None:
    inputs = projection_inputs(2, 19, 41, 64, 7, torch.float16)
    assert torch.equal(correlation_projection(*inputs), correlation_projection(*inputs))


def test_gradients_do_not_depend_on_the_implementation(small: Launches) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):  # the kernel does not take float64
        leaves = [tensor.to(dtype).requires_grad_() for tensor in projection_inputs(2, 19, 41, 64, 7)]
        gradients.append(torch.autograd.grad(correlation_projection(*leaves).square().sum(), leaves))
    assert small.constants.total() == 1
    assert "float64" in dispatch.taken()["correlation_projection"].reason
    for mine, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_real_size() -> None:
    assert_exact(projection_inputs(1, 37 * 37, 37 * 37, 384, 128, torch.float16))
