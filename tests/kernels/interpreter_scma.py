"""The kernels of calibrated attention in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fssdeploy.kernels import dispatch, runtime, scma, scma_flash

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="TRITON_INTERPRET=1 was not set")

# Of the output and its gradients; the interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    start: int
    calibrated: int
    batch: int = 1
    channels: int = 64
    values: int = 64
    span: str = "row"
    dtype: torch.dtype = torch.float32
    splits: int | None = None

    def tensors(self) -> scma.Attended:
        generator = torch.Generator().manual_seed(self.queries + self.keys)
        shapes = ((self.batch, count, self.channels) for count in (self.queries, self.keys))
        query, keys = (torch.randn(shape, generator=generator).mul(self.channels**-0.25) for shape in shapes)
        values = torch.randn((self.batch, self.keys, self.values), generator=generator)
        calibration = torch.rand((self.batch, self.calibrated), generator=generator)
        return query.to(self.dtype), keys.to(self.dtype), values.to(self.dtype), calibration

    def numbers(self) -> tuple[int, float, str, float]:
        return self.start, 10.0, self.span, 2.0 * self.channels**-0.5


# Tiles are 64 queries and 32 keys, 64 keys in the range and for their gradients.
CASES = {
    "one past the tiles": Case(65, 97, 31, 65),
    "one short of the tiles": Case(63, 31, 30, 1, splits=1),
    "exact tiles": Case(64, 64, 0, 64, splits=2),
    "a prime number of everything": Case(13, 101, 17, 67, batch=3, splits=3, dtype=torch.float16),
    "more splits than tiles": Case(2, 40, 3, 35, splits=50, dtype=torch.bfloat16),
    "one of everything": Case(1, 1, 0, 1),
    "nothing calibrated": Case(5, 35, 35, 0, dtype=torch.float16),
    "the range of all queries": Case(67, 37, 2, 30, batch=2, span="global", splits=2),
    "nothing calibrated by all queries": Case(5, 9, 4, 0, span="global"),
    "padded widths": Case(6, 33, 1, 20, channels=70, values=65, dtype=torch.float16, splits=2),
    "the widest": Case(5, 34, 1, 20, channels=256, values=256, span="global", dtype=torch.bfloat16),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """New floating tensors hold NaN: what a kernel does not write shows. Gives the sizes of all that were made."""
    sizes: list[int] = []

    def poisoned(make: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> torch.Tensor:
            made = make(*arguments, **options)
            sizes.append(made.numel())
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    return sizes


def doubled(tensors: scma.Attended) -> scma.Attended:
    query, keys, values, calibration = (tensor.double() for tensor in tensors)
    return query, keys, values, calibration


def exact(case: Case, tensors: scma.Attended) -> scma.Attended:
    return scma.reference_attention(*doubled(tensors), *case.numbers())


def assert_attended(found: scma.Attended, expected: scma.Attended, tolerance: float, range_tolerance: float) -> None:
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    for mine, right in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), right, rtol=range_tolerance, atol=range_tolerance)


def test_flash_forward_and_backward(case: Case) -> None:
    tensors = case.tensors()
    expected = exact(case, tensors)
    found = scma_flash.forward(*tensors, *case.numbers(), splits=case.splits)
    assert found[0].dtype == case.dtype
    tolerance = TOLERANCES[case.dtype]
    assert_attended(found, expected, tolerance, 3e-6)

    start, strength, _, scale = case.numbers()
    gradient = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    exact_gradients = scma.reference_gradients(gradient.double(), *expected, *doubled(tensors), start, strength, scale)
    gradients = scma_flash.backward(gradient, *found, *tensors, start, strength, scale)
    for mine, right, source in zip(gradients, exact_gradients, tensors, strict=False):
        assert mine.dtype == case.dtype
        assert mine.shape == source.shape
        torch.testing.assert_close(mine.double(), right, rtol=2 * tolerance, atol=2 * tolerance)


def test_rows_forward(case: Case) -> None:
    tensors = case.tensors()
    found = scma.attend_rows(*tensors, *case.numbers())
    assert found[0].dtype == case.dtype
    tolerance = TOLERANCES[case.dtype]
    assert_attended(found, exact(case, tensors), 2 * tolerance, 2 * tolerance)  # logits are rounded, too


def test_a_range_of_zero_leaves_the_full_bias() -> None:
    case = Case(3, 40, 4, 34)
    query, keys, values, calibration = case.tensors()
    query, keys = query.mul(4).round(), keys.mul(4).round()  # exact products: the range is exactly zero
    keys[:, 4:38] = keys[:, 4:5]
    tensors = (query, keys, values, calibration)
    for form in (scma_flash.forward, scma.attend_rows):
        assert_attended(form(*tensors, *case.numbers()), exact(case, tensors), 1e-5, 1e-5)


def test_operands_of_any_stride_and_address() -> None:
    case = Case(5, 33, 3, 20, batch=2)
    tensors = case.tensors()
    query, keys = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors[:2])
    shifted = torch.cat([torch.zeros(1), tensors[2].flatten()])[1:].view_as(tensors[2])
    strided = tensors[3].repeat_interleave(2, 1)[:, ::2]
    assert shifted.data_ptr() % 16
    for form in (scma_flash.forward, scma.attend_rows):
        for mine, right in zip(
            form(query, keys, shifted, strided, *case.numbers()), form(*tensors, *case.numbers()), strict=True
        ):
            torch.testing.assert_close(mine, right)


def test_two_runs_are_equal_to_the_last_bit() -> None:
    case = Case(5, 70, 3, 50, splits=3)
    tensors = case.tensors()
    first, second = (scma_flash.forward(*tensors, *case.numbers(), splits=3) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))
    gradients = [scma_flash.backward(torch.ones(1, 5, 64), *first, *tensors, 3, 10.0, 0.1) for _ in range(2)]
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


def test_no_split_is_empty() -> None:
    for keys in range(1, 300, 7):
        for splits in (None, 1, 3, 8, 1000):
            chunk, found = scma_flash.split_keys(keys, 32, 4, splits)
            assert chunk % 32 == 0
            assert (found - 1) * chunk < keys <= found * chunk


class Launches:
    """Stands for a kernel and counts how often it runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


def test_the_operation_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("range_kernel", "forward_kernel", "merge_kernel", "key_gradients_kernel", "query_gradients_kernel")
    counted = {name: Launches(getattr(scma_flash, name)) for name in names}
    for name, launches in counted.items():
        monkeypatch.setattr(scma_flash, name, launches)
    rows = Launches(scma.row_kernel)
    monkeypatch.setattr(scma, "row_kernel", rows)

    case = Case(5, 33, 3, 20)
    query, keys, values, calibration = case.tensors()
    scma.calibrated_attention(query, keys, values, calibration, 3)
    assert dispatch.taken()["calibrated_attention_rows"].implementation == "triton"
    assert rows.count == 1
    assert not any(launches.count for launches in counted.values())

    scma.calibrated_attention(query, keys, values, calibration[:, :0], 3, form="flash")
    assert [launches.count for launches in counted.values()] == [0, 1, 1, 0, 0]

    inputs = (query.requires_grad_(), keys.requires_grad_(), values.requires_grad_())
    output = scma.calibrated_attention(*inputs, calibration, 3)
    found = torch.autograd.grad(output.square().sum(), inputs)
    assert [launches.count for launches in counted.values()] == [1, 2, 2, 1, 1]
    assert rows.count == 1
    for name in ("calibrated_attention", "calibrated_attention_backward"):
        assert dispatch.taken()[name].implementation == "triton"

    query, keys, values = wide = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    expected = scma.reference_attention(query, keys, values, calibration.double(), 3, 10.0, "row", 64**-0.5)[0]
    for mine, right in zip(found, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_what_no_kernel_takes_runs_as_reference() -> None:
    wide = Case(2, 5, 1, 3, channels=257)
    double = doubled(Case(2, 5, 1, 3).tensors())
    long = Case(1, 8193, 1, 3, channels=1, values=1)
    refused = ((wide.tensors(), "flash", "256"), (double, "rows", "float64"), (long.tensors(), "rows", "8192"))
    for tensors, form, cause in refused:
        with pytest.warns(dispatch.KernelWarning, match=cause):
            scma.calibrated_attention(*tensors, 1, form=form)


@pytest.mark.slow
def test_a_realistic_size_without_a_matrix_of_queries_and_keys(poison: list[int]) -> None:
    case = Case(576, 1160, 576, 576, channels=256, values=256, splits=1)
    tensors = case.tensors()
    expected = exact(case, tensors)
    poison.clear()
    found = scma_flash.forward(*tensors, *case.numbers(), splits=1)
    start, strength, _, scale = case.numbers()
    gradient = torch.randn(found[0].shape)
    gradients = scma_flash.backward(gradient, *found, *tensors, start, strength, scale)
    assert max(poison) < 576 * 1160
    assert_attended(found, expected, 1e-5, 1e-5)
    exact_gradients = scma.reference_gradients(gradient.double(), *expected, *doubled(tensors), start, strength, scale)
    for mine, right in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)
    assert_attended(scma.attend_rows(*tensors, *case.numbers()), expected, 1e-5, 1e-5)
