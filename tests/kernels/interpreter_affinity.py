"""The affinity kernels against loops in float64. Run by test_interpreter.py, in Triton's interpreter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fssdeploy.kernels import affinity, dispatch, runtime

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1: see test_interpreter.py")

# Units in the last place of the inputs do not matter: both sides start from the rounded ones.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Poison in every buffer that a launcher allocates, and how often each kernel was launched."""
    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            counts[self.name] += 1
            return self.kernel[grid]

    for name in ("_unit_rows", "_masked_tile_maxima", "_mutual_tile_maxima", "_best_of_tiles"):
        monkeypatch.setattr(affinity, name, Counted(getattr(affinity, name), name))
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield counts


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (rows / rows.norm(dim=-1, keepdim=True)).to(dtype)


def soft_masks(shots: int, masks: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights of which about a third are zero."""
    weights = torch.rand(shots, masks, rows, generator=torch.Generator().manual_seed(7))
    return torch.where(weights < 0.35, 0, weights).to(dtype)


def slow_masked_max(
    query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, indices and the gap to the runner-up, one candidate after the other in float64."""
    query, support, weights = query.double(), support.double(), weights.double()
    shape = (*weights.shape[:2], len(query))
    best, second = torch.full(shape, -torch.inf).double(), torch.full(shape, -torch.inf).double()
    index = torch.full(shape, -1)
    for column in range(support.shape[1]):
        product = torch.einsum("nc,kc->kn", query, support[:, column])[:, None] * weights[:, :, column, None]
        if mode == "exclude":
            product = torch.where(weights[:, :, column, None] == 0, -torch.inf, product)
        better = product > best
        second = torch.where(better, best, torch.maximum(second, product))
        best, index = torch.where(better, product, best), torch.where(better, column, index)
    return best, index, best - second


def assert_maxima(
    values: torch.Tensor, indices: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    best, index, gap = expected
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int64
    torch.testing.assert_close(values.double(), best, atol=TOLERANCE, rtol=0)
    clear = ~(gap <= 2 * TOLERANCE)  # an empty mask has no gap at all, and its index counts
    assert torch.equal(indices[clear], index[clear])
    assert clear.float().mean() > 0.5


def assert_ran(operation: str) -> None:
    assert dispatch.taken()[operation].implementation == "triton", dispatch.taken()[operation].reason


# (Nq, Ns, C, k, M): one row, a tile (64) less one, a tile and one more, primes, padded channels, more than two masks.
SIZES = [
    (1, 1, 64, 1, 1),
    (63, 65, 64, 1, 2),
    (64, 64, 128, 2, 1),
    (67, 131, 70, 2, 2),
    (5, 66, 3, 5, 3),
]


@pytest.mark.parametrize("mode", affinity.MODES)
@pytest.mark.parametrize(("rows", "columns", "channels", "shots", "masks"), SIZES)
def test_masked_max_of_awkward_sizes(
    launches: Counter[str], rows: int, columns: int, channels: int, shots: int, masks: int, mode: str
) -> None:
    query, support = features(rows, channels), features(shots, columns, channels, seed=1)
    weights = soft_masks(shots, masks, columns)
    values, indices = affinity.masked_max(query, support, weights, mode)
    assert_ran("masked_max")
    assert launches == {"_masked_tile_maxima": 1, "_best_of_tiles": 1}
    assert_maxima(values, indices, slow_masked_max(query, support, weights, mode))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", affinity.MODES)
def test_masked_max_of_half_precision(dtype: torch.dtype, mode: str) -> None:
    query, support = features(127, 64, dtype=dtype), features(1, 129, 64, seed=1, dtype=dtype)
    weights = soft_masks(1, 2, 129, dtype)
    values, indices = affinity.masked_max(query, support, weights, mode)
    assert_ran("masked_max")
    assert_maxima(values, indices, slow_masked_max(query, support, weights, mode))


def test_modes_differ_where_every_product_is_negative() -> None:
    query = features(3, 64)
    support = -query[None]
    weights = torch.tensor([[[1.0, 1.0, 0.0]]])
    soft, _ = affinity.masked_max(query[:1], support[:, :1].expand(1, 3, 64), weights, "multiply")
    hard, _ = affinity.masked_max(query[:1], support[:, :1].expand(1, 3, 64), weights, "exclude")
    assert soft.item() == 0
    assert hard.item() == pytest.approx(-1, abs=1e-6)


def test_empty_and_full_masks() -> None:
    query, support = features(30, 64), features(1, 131, 64, seed=1)
    weights = torch.stack([torch.zeros(1, 131), torch.ones(1, 131)], 1)
    values, indices = affinity.masked_max(query, support, weights, "exclude")
    assert (values[:, 0] == -torch.inf).all()
    assert (indices[:, 0] == -1).all()
    assert_maxima(values[:, 1:], indices[:, 1:], slow_masked_max(query, support, weights[:, 1:], "exclude"))
    values, indices = affinity.masked_max(query, support, weights, "multiply")
    assert (values[:, 0] == 0).all()
    assert (indices[:, 0] == 0).all()


def test_one_cell_of_the_last_tile_is_found() -> None:
    query, support = features(9, 64), features(1, 300, 64, seed=1)
    weights = torch.zeros(1, 1, 300)
    weights[..., 299] = 1
    values, indices = affinity.masked_max(query, support, weights, "exclude")
    assert (indices == 299).all()
    torch.testing.assert_close(values[0, 0], support[0, 299] @ query.T, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", affinity.MODES)
def test_of_equal_matches_the_smallest_index_wins(mode: str) -> None:
    query = features(1, 64).expand(65, 64)
    support = query[:1].expand(1, 150, 64)
    weights = torch.ones(1, 2, 150)
    weights[:, 1, :75] = 0  # the first that counts lies in the middle of a tile
    values, indices = affinity.masked_max(query, support, weights, mode)
    assert (indices[:, 0] == 0).all()
    assert (indices[:, 1] == 75).all()
    torch.testing.assert_close(values, torch.ones_like(values))
    _, row_indices, _, column_indices = affinity.mutual_argmax(query, support)
    assert (row_indices == 0).all()
    assert (column_indices == 0).all()


def test_rows_of_zeros_match_the_first() -> None:
    values, indices = affinity.masked_max(torch.zeros(3, 64), features(1, 130, 64), torch.ones(1, 1, 130))
    assert (values == 0).all()
    assert (indices == 0).all()


def test_strided_and_misaligned_tensors() -> None:
    query = features(64, 66).T.contiguous().T[:33, 1:65]  # column-major, and from an odd address
    support = features(2, 40, 128, seed=1)[:, ::2, ::2]
    weights = soft_masks(2, 40, 2).transpose(1, 2)[..., ::2]
    values, indices = affinity.masked_max(query, support, weights)
    assert_ran("masked_max")
    assert_maxima(values, indices, slow_masked_max(query, support, weights, "multiply"))


@pytest.mark.parametrize(("rows", "columns", "channels", "shots"), [(1, 1, 64, 1), (63, 129, 64, 2), (67, 5, 70, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mutual_argmax(
    launches: Counter[str], rows: int, columns: int, channels: int, shots: int, dtype: torch.dtype
) -> None:
    query, support = features(rows, channels, dtype=dtype), features(shots, columns, channels, seed=1, dtype=dtype)
    values, indices, column_values, column_indices = affinity.mutual_argmax(query, support)
    assert_ran("mutual_argmax")
    assert launches == {"_mutual_tile_maxima": 1, "_best_of_tiles": 2}
    every = torch.ones(shots, 1, columns)
    assert_maxima(values[:, None], indices[:, None], slow_masked_max(query, support, every, "multiply"))
    for shot in range(shots):
        expected = slow_masked_max(support[shot], query[None], torch.ones(1, 1, rows), "multiply")
        assert_maxima(column_values[None, None, shot], column_indices[None, None, shot], expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (5, 3, 131), (129, 768)])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unit_rows(shape: tuple[int, ...], half: bool, dtype: torch.dtype) -> None:
    rows = (features(*shape) * torch.linspace(0.1, 30, shape[-1])).to(dtype)
    rows[..., 0, :] = 0
    unit = affinity.unit_rows(rows, half=half)
    assert_ran("unit_rows")
    assert unit.shape == rows.shape
    assert unit.dtype == (torch.float16 if half else dtype)
    exact = rows.double()
    expected = exact / exact.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    # The interpreter cuts bfloat16 off where the hardware rounds it.
    unit_in_last_place = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[unit.dtype]
    torch.testing.assert_close(unit.double(), expected, rtol=unit_in_last_place, atol=1e-7)
    assert (unit[..., 0, :] == 0).all()


def test_unit_rows_of_a_transposed_tensor_with_a_large_eps() -> None:
    rows = features(64, 33).T
    unit = affinity.unit_rows(rows, eps=100.0, half=False)
    assert_ran("unit_rows")
    torch.testing.assert_close(unit, rows / 100)


def test_runs_are_equal_to_the_bit() -> None:
    query, support, weights = features(65, 64), features(2, 65, 64, seed=1), soft_masks(2, 2, 65)
    first, second = (
        (*affinity.masked_max(query, support, weights), *affinity.mutual_argmax(query, support)) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_more_tiles_than_the_reduction_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(affinity.REDUCTION, "TILES", 2)
    query, support, weights = features(9, 64), features(1, 330, 64, seed=1), soft_masks(1, 2, 330)
    values, indices = affinity.masked_max(query, support, weights, "exclude")
    assert_maxima(values, indices, slow_masked_max(query, support, weights, "exclude"))
    _, indices = affinity.masked_max(query, support[:, :1].expand_as(support), torch.ones_like(weights))
    assert (indices == 0).all()


def test_gradients_through_the_kernel_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [features(20, 64), features(2, 30, 64, seed=1), soft_masks(2, 2, 30)]
    gradients = []
    for implementation in ("triton", "reference"):
        monkeypatch.setenv(dispatch.VARIABLE, implementation)
        query, support, weights = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        affinity.masked_max(query, support, weights)[0].square().sum().backward()
        assert dispatch.taken()["masked_max"].implementation == implementation
        gradients.append([leaf.grad for leaf in leaves])
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("operation", ["unit_rows", "masked_max", "mutual_argmax"])
def test_float64_runs_as_reference_and_says_so(operation: str) -> None:
    query, support = features(5, 64).double(), features(1, 6, 64).double()
    arguments = {
        "unit_rows": (query,),
        "masked_max": (query, support, torch.ones(1, 1, 6).double()),
        "mutual_argmax": (query, support),
    }[operation]
    dispatch._warn_once.cache_clear()
    with pytest.warns(dispatch.KernelWarning, match=f"{operation}.*float64"):
        getattr(affinity, operation)(*arguments)
    assert dispatch.taken()[operation].implementation == "reference"


def test_rows_too_long_for_the_kernel_run_as_reference() -> None:
    dispatch._warn_once.cache_clear()
    with pytest.warns(dispatch.KernelWarning, match="unit_rows.*channels"):
        affinity.unit_rows(torch.ones(2, affinity.LONGEST_ROW + 1))


@pytest.mark.slow
def test_real_sizes() -> None:
    query, support = features(1369, 768), features(1, 1369, 768, seed=1)
    weights = soft_masks(1, 2, 1369)
    values, indices = affinity.masked_max(query, support, weights)
    assert_ran("masked_max")
    assert_maxima(values, indices, slow_masked_max(query, support, weights, "multiply"))
    row_values, _, column_values, _ = affinity.mutual_argmax(query, support)
    products = query.double() @ support[0].double().T
    torch.testing.assert_close(row_values[0].double(), products.amax(1), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(column_values[0].double(), products.amax(0), atol=TOLERANCE, rtol=0)
