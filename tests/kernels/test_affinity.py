"""The affinity operations on the CPU: their mathematics, gradients and contracts, and PyTorch's compilers over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fssdeploy.errors import InputError
from fssdeploy.kernels import affinity, dispatch, onnx_node


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def soft_masks(shots: int, masks: int, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Weights of which about a third are zero."""
    weights = torch.rand(shots, masks, rows, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.where(weights < 0.35, 0, weights).to(dtype)


def arguments(operation: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Small tensors without ties, as the operation takes them."""
    query, support, weights = (
        random(5, 8, dtype=dtype),
        random(2, 7, 8, seed=1, dtype=dtype),
        soft_masks(2, 2, 7, dtype),
    )
    return {
        "unit_rows": (query, 1e-12, False),
        "masked_means": (query, support, weights),
        "masked_max": (query, support, weights.clamp(min=0.1), "exclude"),
        "mutual_argmax": (query, support),
    }[operation]


OPERATIONS = ("unit_rows", "masked_means", "masked_max", "mutual_argmax")


# --- Mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2, 5])
@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("mode", affinity.MODES)
def test_masked_max_is_what_a_loop_finds(shots: int, masks: int, mode: str) -> None:
    query, support, weights = random(11, 13), random(shots, 17, 13, seed=1), soft_masks(shots, masks, 17)
    values, indices = affinity.masked_max(query, support, weights, mode)
    assert values.dtype == torch.float64
    for shot in range(shots):
        for mask in range(masks):
            for row in range(11):
                best, where = -math.inf, -1
                for column in range(17):
                    weight = weights[shot, mask, column].item()
                    product = weight * sum(query[row, c].item() * support[shot, column, c].item() for c in range(13))
                    if (mode == "multiply" or weight != 0) and product > best:
                        best, where = product, column
                assert values[shot, mask, row].item() == pytest.approx(best, abs=1e-12)
                assert indices[shot, mask, row] == where


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_masked_means_are_means_of_the_matrix(shots: int) -> None:
    query, support, weights = random(11, 13), random(shots, 17, 13, seed=1), soft_masks(shots, 3, 17)
    weights[0, 1] = 0  # an empty mask
    products = torch.einsum("qc,ksc->kqs", query, support)
    for mask in range(3):
        for shot in range(shots):
            expected = (products[shot] * weights[shot, mask]).sum(1) / weights[shot, mask].sum().clamp(min=1e-30)
            found = affinity.masked_means(query, support, weights)[shot, mask]
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert (affinity.masked_means(query, support, weights)[0, 1] == 0).all()


def test_mutual_argmax_reads_rows_and_columns_of_the_matrix() -> None:
    query, support = random(11, 13), random(2, 17, 13, seed=1)
    values, indices, column_values, column_indices = affinity.mutual_argmax(query, support)
    for shot in range(2):
        matrix = (query @ support[shot].T).tolist()
        assert values[shot].tolist() == [max(row) for row in matrix]
        assert indices[shot].tolist() == [row.index(max(row)) for row in matrix]
        columns = [list(column) for column in zip(*matrix, strict=True)]
        assert column_values[shot].tolist() == [max(column) for column in columns]
        assert column_indices[shot].tolist() == [column.index(max(column)) for column in columns]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    query, support, weights = random(9, 600, dtype=dtype), random(2, 40, 600, seed=1, dtype=dtype), soft_masks(2, 2, 40)
    weights = weights.to(dtype)
    values, _ = affinity.masked_max(query, support, weights)
    exact, _ = affinity.masked_max(query.double(), support.double(), weights.double())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, atol=1e-4, rtol=1e-5)
    means = affinity.masked_means(query, support, weights)
    assert means.dtype == dtype
    exact = affinity.masked_means(query.double(), support.double(), weights.double())
    torch.testing.assert_close(means.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_masked_means_of_many_large_features_do_not_overflow_half_precision() -> None:
    support = torch.full((1, 4096, 64), 100.0, dtype=torch.float16)
    means = affinity.masked_means(
        torch.ones(1, 64, dtype=torch.float16), support, torch.ones(1, 1, 4096, dtype=torch.float16)
    )
    assert means.item() == 6400


def test_unit_rows() -> None:
    rows = random(3, 5, 7)
    rows[1, 2] = 0
    unit = affinity.unit_rows(rows, half=False)
    lengths = unit.square().sum(-1).sqrt()
    assert lengths[1, 2] == 0
    lengths[1, 2] = 1
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    torch.testing.assert_close(unit * rows.norm(dim=-1, keepdim=True), rows)
    assert affinity.unit_rows(rows).dtype == torch.float16
    large = torch.full((2, 64), 60000.0, dtype=torch.float16)  # its squares overflow half precision
    torch.testing.assert_close(affinity.unit_rows(large), torch.full_like(large, 1 / 8))


# --- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_those_of_finite_differences(operation: str) -> None:
    tensors = arguments(operation)
    leaves = [one.requires_grad_() if isinstance(one, torch.Tensor) else one for one in tensors]

    def values(*leaves: Any) -> tuple[torch.Tensor, ...]:
        outputs = getattr(affinity, operation)(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output for output in outputs if output.is_floating_point())

    assert torch.autograd.gradcheck(values, leaves)


def test_gradients_of_empty_masks_and_of_zero_rows_are_zero() -> None:
    query, support = random(4, 8).requires_grad_(), random(1, 6, 8, seed=1).requires_grad_()
    weights = torch.zeros(1, 1, 6, dtype=torch.float64, requires_grad=True)
    values, _ = affinity.masked_max(query, support, weights, "exclude")
    values.sum().backward()
    affinity.masked_means(query, support, weights).sum().backward()
    for leaf in (query, support, weights):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
    rows = torch.zeros(2, 3, requires_grad=True)
    affinity.unit_rows(rows, eps=0.5, half=False).sum().backward()
    assert rows.grad is not None
    assert (rows.grad == 2).all()  # under eps the map is linear


@pytest.mark.parametrize("operation", ["masked_max", "mutual_argmax"])
def test_indices_are_not_differentiable(operation: str) -> None:
    leaves = [one.requires_grad_() if isinstance(one, torch.Tensor) else one for one in arguments(operation)]
    outputs = getattr(affinity, operation)(*leaves)
    assert [output.requires_grad for output in outputs] == [output.is_floating_point() for output in outputs]


def test_gradients_have_the_dtype_of_the_features() -> None:
    leaves = [one.requires_grad_() for one in arguments("masked_means", torch.bfloat16)]
    affinity.masked_means(*leaves).sum().backward()
    affinity.masked_max(*leaves)[0].sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.bfloat16}


# --- What PyTorch sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_registration(operation: str) -> None:
    tensors = [one.requires_grad_() if isinstance(one, torch.Tensor) else one for one in arguments(operation)]
    torch.library.opcheck(getattr(torch.ops.fssdeploy, operation).default, tuple(tensors))


class Everything(torch.nn.Module):
    def forward(self, query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        unit = affinity.unit_rows(query, half=False)
        means = affinity.masked_means(unit, support, weights)
        return means, *affinity.masked_max(unit, support, weights), *affinity.mutual_argmax(unit, support)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_export_with_dynamic_sizes_keeps_the_operations() -> None:
    Dim = torch.export.Dim
    queries, rows, shots, masks = Dim("queries"), Dim("rows"), Dim("shots"), Dim("masks")
    shapes = {"query": {0: queries}, "support": {0: shots, 1: rows}, "weights": {0: shots, 1: masks, 2: rows}}
    inputs = (random(5, 8), random(2, 7, 8, seed=1), soft_masks(2, 2, 7))
    program = torch.export.export(Everything(), inputs, dynamic_shapes=shapes).run_decompositions()
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if name.startswith("fssdeploy")] == [
        f"fssdeploy.{operation}.default" for operation in OPERATIONS
    ]
    others = (random(9, 8), random(3, 4, 8, seed=1), soft_masks(3, 5, 4))
    assert_same(program.module()(*others), Everything()(*others))


def test_compiles_as_one_graph() -> None:
    inputs = [one.requires_grad_() for one in (random(5, 8), random(2, 7, 8, seed=1), soft_masks(2, 2, 7))]
    compiled = torch.compile(Everything(), backend="aot_eager", fullgraph=True)
    expected = Everything()(*inputs)
    found = compiled(*inputs)
    assert_same(found, expected)
    gradients = [
        torch.autograd.grad(sum(one.sum() for one in outputs if one.requires_grad), inputs)
        for outputs in (found, expected)
    ]
    assert_same(*gradients)


def test_nodes_of_an_export_to_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node has the outputs that the operation has, by dtype and shape."""
    seen = []

    def record(operator: str, inputs: Any, attributes: Any, outputs: Any) -> tuple[torch.Tensor, ...]:
        seen.append((operator, len(inputs), attributes))
        return tuple(torch.empty(tuple(shape), dtype=dtype) for dtype, shape in outputs)

    monkeypatch.setattr(onnx_node, "node", record)
    for operation in OPERATIONS:
        tensors = arguments(operation, torch.float16)
        monkeypatch.setattr(onnx_node, "tracing", lambda: False)
        expected = getattr(affinity, operation)(*tensors)
        monkeypatch.setattr(onnx_node, "tracing", lambda: True)
        traced = getattr(affinity, operation)(*tensors)
        assert type(traced) is type(expected)
        pairs = zip(traced, expected, strict=True) if isinstance(traced, tuple) else [(traced, expected)]
        assert all((one.shape, one.dtype) == (other.shape, other.dtype) for one, other in pairs)
    assert seen == [
        ("UnitRows", 1, {"eps": 1e-12, "half": 0}),
        ("MaskedMeans", 3, {}),
        ("MaskedMax", 3, {"exclude": 1}),
        ("MutualArgmax", 2, {}),
    ]


def test_says_which_implementation_ran() -> None:
    for operation in OPERATIONS:
        getattr(affinity, operation)(*arguments(operation))
    assert all(dispatch.taken()[operation].implementation == "reference" for operation in OPERATIONS)
    assert "linear algebra" in dispatch.taken()["masked_means"].reason


# --- Contract --------------------------------------------------------------------------------------------------------

Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[Any, ...]]
WRONG: dict[str, tuple[Change, str]] = {
    "rank of query": (lambda q, s, w: (q[None], s, w), "query has shape"),
    "rank of support": (lambda q, s, w: (q, s[0], w), "support has shape"),
    "rank of weights": (lambda q, s, w: (q, s, w[0]), "weights has shape"),
    "channels": (lambda q, s, w: (q[:, :5], s, w), "query has 5, support has 8"),
    "shots": (lambda q, s, w: (q, s, w[:1]), "shots"),
    "support rows": (lambda q, s, w: (q, s, w[..., :3]), "support rows"),
    "dtypes": (lambda q, s, w: (q, s.half(), w), "dtypes"),
    "dtype of weights": (lambda q, s, w: (q, s, w.float()), "dtypes"),
    "whole numbers": (lambda q, s, w: (q.long(), s.long(), w.long()), "floating"),
    "devices": (lambda q, s, w: (q, s.to("meta"), w), "device"),
    "no query": (lambda q, s, w: (q[:0], s, w), "query_rows"),
    "no support": (lambda q, s, w: (q, s[:, :0], w[..., :0]), "support_rows"),
    "no shots": (lambda q, s, w: (q, s[:0], w[:0]), "shots"),
    "no masks": (lambda q, s, w: (q, s, w[:, :0]), "masks"),
    "no channels": (lambda q, s, w: (q[:, :0], s[..., :0], w), "channels"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_do_not_fit_are_refused(wrong: str) -> None:
    change, said = WRONG[wrong]
    tensors = change(random(5, 8), random(2, 7, 8, seed=1), soft_masks(2, 2, 7))
    for operation in (affinity.masked_max, affinity.masked_means):
        with pytest.raises(InputError, match=said) as caught:
            operation(*tensors)
        assert caught.value.code == "kernel_input"
        assert operation.__name__ in str(caught.value)
    if wrong not in {"rank of weights", "shots", "support rows", "dtype of weights", "no masks"}:
        with pytest.raises(InputError, match=said):
            affinity.mutual_argmax(*tensors[:2])


def test_wrong_mode() -> None:
    with pytest.raises(InputError, match="multiply, exclude"):
        affinity.masked_max(random(5, 8), random(2, 7, 8), soft_masks(2, 2, 7), "median")


@pytest.mark.parametrize(
    ("rows", "eps", "said"),
    [
        (torch.tensor(1.0), 1e-12, "single number"),
        (torch.ones(0, 4), 1e-12, "no elements"),
        (torch.ones(2, 4, dtype=torch.long), 1e-12, "floating"),
        (torch.ones(2, 4), 0.0, "eps"),
        (torch.ones(2, 4), math.nan, "eps"),
    ],
)
def test_rows_that_cannot_be_normalised_are_refused(rows: torch.Tensor, eps: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        affinity.unit_rows(rows, eps)


def test_nothing_out_of_range_from_features_that_are_not_finite() -> None:
    query = torch.full((3, 4), torch.nan, requires_grad=True)
    values, indices = affinity.masked_max(query, torch.ones(1, 5, 4), torch.ones(1, 1, 5), "exclude")
    assert ((indices >= -1) & (indices < 5)).all()
    values.sum().backward()


def test_the_shipped_configurations_are_those_that_are_launched() -> None:
    kernels = {kernel.name: kernel for kernel in affinity.shipped()}
    assert len(kernels) == len(affinity.shipped())
    assert {name.rsplit("_", 1)[0] for name in kernels} == {"best_of", "unit_rows", "masked_max", "mutual_argmax"}
    for kernel in kernels.values():
        assert set(kernel.constexprs) == {name for name, kind in kernel.signature.items() if kind == "constexpr"}
        assert set(kernel.aligned) <= set(kernel.signature)
    tile = affinity.TILES[2]
    assert kernels["masked_max_fp16"].constexprs["BLOCK_Q"] == tile.block_q
    assert kernels["masked_max_fp16"].num_warps == tile.num_warps
