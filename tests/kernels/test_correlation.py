"""Correlations and projections against loops in float64, their gradients, and what PyTorch's tracers make of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fssdeploy.errors import InputError
from fssdeploy.kernels import correlation, runtime
from fssdeploy.kernels.correlation import (
    correlation_projection,
    fold_projection,
    folded_projection,
    hypercorrelation,
)

Inputs = tuple[torch.Tensor, ...]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fold_inputs(shots: int, cells: int, channels: int, outputs: int, dtype: torch.dtype = torch.float64) -> Inputs:
    weights = random(shots, cells, dtype=dtype, seed=1).abs()
    return random(shots, cells, channels, dtype=dtype), weights, random(outputs, cells, dtype=dtype, seed=2)


def hyper_inputs(layers: int, queries: int, cells: int, channels: int, dtype: torch.dtype = torch.float64) -> Inputs:
    support, weights = random(layers, cells, channels, dtype=dtype, seed=1), random(cells, dtype=dtype, seed=2).abs()
    return random(layers, queries, channels, dtype=dtype), support, weights


def projection_inputs(
    shots: int, queries: int, cells: int, channels: int, outputs: int, dtype: torch.dtype = torch.float64
) -> Inputs:
    support = random(shots, cells, channels, dtype=dtype, seed=1)
    return random(queries, channels, dtype=dtype), support, random(shots, cells, outputs, dtype=dtype, seed=2)


CASES: list[tuple[Callable[..., torch.Tensor], Inputs]] = [
    (fold_projection, fold_inputs(2, 5, 7, 3)),
    (hypercorrelation, hyper_inputs(2, 3, 5, 4)),
    (correlation_projection, projection_inputs(2, 7, 5, 4, 3)),
]
each_operation = pytest.mark.parametrize(("operation", "inputs"), CASES, ids=[case[0].__name__ for case in CASES])


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_the_fold_is_the_mean_over_shots_of_the_projected_correlation(shots: int) -> None:
    support, weights, projection = fold_inputs(shots, 11, 6, 4)
    query, bias = random(9, 6, seed=3), random(4, seed=4)
    expected = np.zeros((9, 4))
    for i, out in itertools.product(range(9), range(4)):
        for shot, cell in itertools.product(range(shots), range(11)):
            product = float(query[i] @ support[shot, cell])
            expected[i, out] += float(projection[out, cell] * weights[shot, cell]) * product / shots
    found = folded_projection(query, fold_projection(support, weights, projection), bias)
    np.testing.assert_allclose(found.numpy(), expected + bias.numpy(), rtol=1e-12)


def test_the_fold_of_an_empty_mask_is_zero() -> None:
    support, weights, projection = fold_inputs(2, 5, 7, 3)
    assert not fold_projection(support, weights * 0, projection).any()


def test_hypercorrelation_is_the_rectified_cosine_of_every_layer() -> None:
    query, support, weights = hyper_inputs(3, 5, 7, 4)
    found = hypercorrelation(query, support, weights).numpy()
    for layer, i, j in itertools.product(range(3), range(5), range(7)):
        q, s = query[layer, i].numpy(), support[layer, j].numpy() * float(weights[j])
        cosine = q @ s / (np.linalg.norm(q) + 1e-5) / (np.linalg.norm(s) + 1e-5)
        assert found[layer, i, j] == pytest.approx(max(cosine, 0), abs=1e-12)
    assert (found == 0).any()
    assert (found > 0.5).any()


def test_hypercorrelation_of_masked_cells_and_zero_features_is_zero() -> None:
    query, support, weights = hyper_inputs(2, 5, 7, 4)
    weights[3], query[1, 2] = 0, 0
    found = hypercorrelation(query, support, weights)
    assert not found[:, :, 3].any()
    assert not found[1, 2].any()
    assert found[0, 2].any()


@pytest.mark.parametrize(("shots", "queries", "cells"), [(1, 1, 1), (2, 7, 13), (5, 3, 2)])
def test_projection_of_the_rectified_correlation(shots: int, queries: int, cells: int) -> None:
    query, support, projection = projection_inputs(shots, queries, cells, 6, 3)
    found = correlation_projection(query, support, projection).numpy()
    for shot, i, out in itertools.product(range(shots), range(queries), range(3)):
        products = [max(float(query[i] @ support[shot, j]), 0) * float(projection[shot, j, out]) for j in range(cells)]
        assert found[shot, i, out] == pytest.approx(sum(products), abs=1e-12)


@each_operation
def test_strides_do_not_matter_and_outputs_are_new(operation: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in inputs]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(operation(*strided), operation(*inputs))


@each_operation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_other_dtypes(
    operation: Callable[..., torch.Tensor], inputs: Inputs, dtype: torch.dtype, tolerance: float
) -> None:
    found = operation(*(tensor.to(dtype) for tensor in inputs))
    expected = operation(*(tensor.to(dtype).double() for tensor in inputs))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@each_operation
def test_gradients(operation: Callable[..., torch.Tensor], inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "BACKWARD_ROWS", 3)  # several blocks, the last of them short
    assert torch.autograd.gradcheck(operation, [tensor.clone().requires_grad_() for tensor in inputs])


def test_gradients_where_a_masked_cell_and_a_query_have_no_features() -> None:
    query, support, weights = hyper_inputs(1, 2, 3, 4)
    weights[1], query[0, 0] = 0, 0
    leaves = [tensor.requires_grad_() for tensor in (query, support, weights)]
    expected = torch.autograd.grad(correlation._hypercorrelation(*leaves).sum(), leaves)
    found = torch.autograd.grad(hypercorrelation(*leaves).sum(), leaves)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    for operation, inputs in CASES:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        found = torch.autograd.grad(operation(*leaves).sum(), leaves)
        for mine, expected in zip(found, torch.autograd.grad(operation(*exact).sum(), exact), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), expected, rtol=0.1, atol=0.1)


def test_small_weights_overflow_no_gradient() -> None:
    """Behind a weight of 1e-4 the gradient of the masked features is beyond float16."""
    torch.manual_seed(0)
    query, support = torch.randn(1, 300, 8), 0.05 * torch.randn(1, 4, 8)
    leaves = [each.half().requires_grad_() for each in (query, support, torch.full((4,), 1e-4))]
    found = torch.autograd.grad(correlation.hypercorrelation(*leaves).sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(correlation.hypercorrelation(*exact).sum(), exact)
    assert found[1].isfinite().all()  # that of the weights themselves is beyond float16 in truth
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0.05, atol=5)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_backward_pass_never_holds_the_whole_correlation() -> None:
    queries, cells = 4 * correlation.BACKWARD_ROWS + 1, 97
    inputs = projection_inputs(1, queries, cells, 4, 3)
    with LargestTensor() as largest:
        correlation._projection_gradients(random(1, queries, 3), *inputs)
    assert correlation.BACKWARD_ROWS * cells <= largest.elements < queries * cells / 3


@each_operation
def test_registration(operation: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    leaves = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    torch.library.opcheck(getattr(torch.ops.fssdeploy, operation.__name__).default, leaves)


def test_registration_of_the_backward_operation() -> None:
    inputs = (random(2, 7, 3), *projection_inputs(2, 7, 5, 4, 3))
    torch.library.opcheck(torch.ops.fssdeploy.correlation_projection_backward.default, inputs)


class Module(torch.nn.Module):
    def __init__(self, operation: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.operation(*inputs)


@each_operation
def test_export_with_dynamic_sizes(operation: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    dynamic = (tuple({axis: torch.export.Dim.AUTO for axis in range(tensor.dim())} for tensor in inputs),)
    program = torch.export.export(Module(operation), inputs, dynamic_shapes=dynamic)
    other = {
        "fold_projection": fold_inputs(3, 4, 5, 6),
        "hypercorrelation": hyper_inputs(3, 5, 4, 7),
        "correlation_projection": projection_inputs(3, 4, 9, 5, 2),
    }[operation.__name__]
    torch.testing.assert_close(program.module()(*other), operation(*other))


@each_operation
def test_compilation_with_gradients(operation: Callable[..., torch.Tensor], inputs: Inputs) -> None:
    compiled = torch.compile(operation, backend="aot_eager", fullgraph=True, dynamic=True)
    gradients = []
    for function in (operation, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        gradients.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
    torch.testing.assert_close(gradients[1], gradients[0])


FOLD, HYPER, PROJECT = (inputs for _, inputs in CASES)
MISFITS: dict[str, tuple[Callable[..., torch.Tensor], Inputs, str]] = {
    "fold rank": (fold_projection, (FOLD[0][0], *FOLD[1:]), "support has shape"),
    "fold dtype": (fold_projection, (FOLD[0].float(), *FOLD[1:]), "different dtypes"),
    "fold shots": (fold_projection, (FOLD[0][:1], *FOLD[1:]), "shots"),
    "fold cells": (fold_projection, (FOLD[0], FOLD[1], FOLD[2][:, 1:]), "support cells"),
    "fold nothing": (fold_projection, (FOLD[0][:, :0], FOLD[1][:, :0], FOLD[2][:, :0]), "no cells"),
    "hyper layers": (hypercorrelation, (HYPER[0][:1], *HYPER[1:]), "layers"),
    "hyper channels": (hypercorrelation, (HYPER[0][..., :1], *HYPER[1:]), "channels"),
    "hyper mask": (hypercorrelation, (*HYPER[:2], HYPER[2][:1]), "support cells"),
    "hyper integers": (hypercorrelation, tuple(tensor.long() for tensor in HYPER), "floating point"),
    "projection channels": (correlation_projection, (PROJECT[0][:, :1], *PROJECT[1:]), "channels"),
    "projection shots": (correlation_projection, (*PROJECT[:2], PROJECT[2][:1]), "shots"),
    "projection cells": (correlation_projection, (*PROJECT[:2], PROJECT[2][:, :1]), "support cells"),
    "projection device": (correlation_projection, (*PROJECT[:2], PROJECT[2].to("meta")), "different devices"),
    "projection nothing": (correlation_projection, (*PROJECT[:2], PROJECT[2][..., :0]), "no outputs"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_belong_together(misfit: str) -> None:
    operation, inputs, said = MISFITS[misfit]
    with pytest.raises(InputError, match=said) as caught:
        operation(*inputs)
    assert caught.value.code == "kernel_input"
    assert operation.__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("queries", "cells", "outputs", "said"),
    [(2**26, 8, 8, "query"), (8, 2**26, 8, "support"), (2**25, 8, 64, "output")],
)
def test_the_kernel_declines_sizes_beyond_its_indices(queries: int, cells: int, outputs: int, said: str) -> None:
    query, support, projection = (
        torch.empty(shape, device="meta") for shape in ((queries, 32), (1, cells, 32), (1, cells, outputs))
    )
    with pytest.raises(runtime.UnsupportedError, match=said):
        correlation._launch(query, support, projection)


def test_every_shipped_configuration_is_complete() -> None:
    names = [kernel.name for kernel in correlation.shipped()]
    assert len(set(names)) == len(names) == 10
    for kernel in correlation.shipped():
        assert set(kernel.aligned) < set(kernel.signature)
        arguments = {name for name, kind in kernel.signature.items() if kind == "constexpr"}
        assert arguments == set(kernel.constexprs)
