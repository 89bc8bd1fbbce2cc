"""Dense cosine affinity between query and support positions, and what few-shot systems read from it.

`unit_rows` prepares features; the inner products of unit rows are cosines. The whole matrix is one `matmul` (cuBLAS),
so it has no operation here. `masked_means` needs no matrix at all: the mean of inner products is the inner product with
the mean. `masked_max` and `mutual_argmax` reduce the matrix tile by tile and never store it.

Contract of all operations: floating tensors of one dtype on one device; strides are free (kernels read packed copies
where they must); inputs are finite, a NaN or an infinity gives unspecified values but never an index out of range; the
smallest index wins a tie; kernels accumulate in float32, and float64 always runs as reference. No result depends on the
order in which blocks run. Values are differentiable (maxima through the winning pair), indices are not.

Kernels write the best of every tile, and a second small kernel reduces those. A packed 64-bit atomic maximum would
spare that second launch, but needs an initialised buffer and an unpacking pass instead, and neither TensorRT nor a
single ONNX node can provide them.

Sources: prior maps from the best match, PFENet (Tian et al., 2020, section 3.2, eqs. 3 and 4) and GF-SAM (Zhang et al.,
2024, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fssdeploy.kernels import contract, dispatch, onnx_node, runtime
from fssdeploy.kernels.runtime import jit, tl
from fssdeploy.kernels.shipped_kernel import ShippedKernel

MODES = ("multiply", "exclude")
# Kernels read this many channels at a time; other channel counts are padded with zeros.
CHANNEL_STEP = 64
SMALLEST_EPS = 1e-37

# Best value and index of every row, and of every column.
Matches = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


# --- Reference -------------------------------------------------------------------------------------------------------


def unit_rows_reference(rows: torch.Tensor, eps: float, half: bool) -> torch.Tensor:
    """`unit_rows` in plain PyTorch."""
    exact = _wide(rows)
    unit = exact / torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp(min=eps)
    return unit.to(torch.float16 if half else rows.dtype)


def masked_means_reference(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`masked_means` in plain PyTorch."""
    means, _ = _support_means(_wide(support), _wide(weights))
    return (means @ _wide(query).T).to(query.dtype)


def masked_max_reference(
    query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`masked_max` in plain PyTorch; holds the matrix of one shot and mask at a time."""
    values, indices = [], []
    for rows, masks in zip(support, _wide(weights), strict=True):
        products = inner_products(query, rows)
        for mask in masks:
            weighted = products * mask
            if mode == "exclude":
                weighted = weighted.masked_fill(mask == 0, -torch.inf)
            value, index = weighted.max(1)
            values.append(value)
            indices.append(torch.where(value == -torch.inf, -1, index))
    shape = (*weights.shape[:2], len(query))
    return torch.stack(values).view(shape), torch.stack(indices).view(shape)


def mutual_argmax_reference(query: torch.Tensor, support: torch.Tensor) -> Matches:
    """`mutual_argmax` in plain PyTorch; holds the matrix of one shot at a time."""
    best = [(*products.max(1), *products.max(0)) for products in (inner_products(query, rows) for rows in support)]
    row_values, row_indices, column_values, column_indices = map(torch.stack, zip(*best, strict=True))
    return row_values, row_indices, column_values, column_indices


def inner_products(query: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """The affinity matrix (Nq, Ns) of rows (Nq, C) and (Ns, C), exact products accumulated and returned in float32."""
    if query.is_cuda and query.element_size() == 2:
        return torch.mm(query, support.T, out_dtype=torch.float32)
    return _wide(query) @ _wide(support).T


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _support_means(support: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means (k, M, C) of support rows, zero for an empty mask, and 1 / sum of weights (k, M, 1), likewise."""
    total = weights.sum(2, keepdim=True)
    inverse = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
    return weights @ support * inverse, inverse


# --- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def _unit_rows(rows, row_count, channels, eps, unit, ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """unit[i] = rows[i] / max(|rows[i]|, eps); a program takes ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < row_count)[:, None] & (channel < channels)[None, :]
    offset = row[:, None] * channels + channel[None, :]
    values = tl.load(rows + offset, mask=inside, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(values * values, 1)), eps)
    tl.store(unit + offset, (values / norm[:, None]).to(unit.dtype.element_ty), mask=inside)


@jit
def _tile_products(  # type: ignore[no-untyped-def]
    query, support, row, column, channels, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """<query[row], support[column]> for a tile, (BLOCK_Q, BLOCK_S) in float32."""
    channel = tl.arange(0, BLOCK_C)
    left = query + row[:, None] * channels + channel[None, :]
    right = support + column[None, :] * channels + channel[:, None]
    products = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
    for _ in range(0, channels, BLOCK_C):
        a, b = tl.load(left), tl.load(right)
        if UP:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, products, input_precision=PRECISION)
        left += BLOCK_C
        right += BLOCK_C
    return products


@jit
def _masked_tile_maxima(  # type: ignore[no-untyped-def]
    query, support, weights, shots, masks, query_rows, support_rows, channels, exclude, values, indices,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The best weighted product of every query row in one tile of support rows, and where it is.

    query (Nq, C), support (k, Ns, C), weights (k, M, tiles * BLOCK_S) -> values, indices (k * M, tiles, Nq). `shots` is
    k, of which the grid is made. Rows beyond the end are clamped and weights are padded, since a mask on loads would
    split them into single elements.
    """
    tile, shot = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    near_row, near_column = tl.minimum(row, query_rows - 1), tl.minimum(column, support_rows - 1)
    support += shot * support_rows * channels
    products = _tile_products(query, support, near_row, near_column, channels, BLOCK_Q, BLOCK_S, BLOCK_C, PRECISION, UP)
    padded_columns = tl.num_programs(1) * BLOCK_S
    for mask in range(masks):
        group = shot * masks + mask
        weight = tl.load(weights + group * padded_columns + column).to(tl.float32)
        counts = (column < support_rows) & ((weight != 0.0) | (exclude == 0))
        weighted = tl.where(counts[None, :], products * weight[None, :], -float("inf"))
        value, index = tl.max(weighted, 1, return_indices=True)
        out = (group * tl.num_programs(1) + tile) * query_rows + row
        tl.store(values + out, value, mask=row < query_rows)
        tl.store(indices + out, tl.minimum(tile * BLOCK_S + index, support_rows - 1), mask=row < query_rows)


@jit
def _mutual_tile_maxima(  # type: ignore[no-untyped-def]
    query, support, shots, query_rows, support_rows, channels, row_values, row_indices, column_values, column_indices,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The best product of every row and of every column of one tile, and where it is.

    query (Nq, C), support (k, Ns, C) -> rows (k, tiles of columns, Nq), columns (k, tiles of rows, Ns).
    """
    row_tile, column_tile, shot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = row_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = column_tile * BLOCK_S + tl.arange(0, BLOCK_S)
    near_row, near_column = tl.minimum(row, query_rows - 1), tl.minimum(column, support_rows - 1)
    support += shot * support_rows * channels
    products = _tile_products(query, support, near_row, near_column, channels, BLOCK_Q, BLOCK_S, BLOCK_C, PRECISION, UP)
    # Clamped rows repeat the last one, which comes first and so wins against them.
    value, index = tl.max(products, 1, return_indices=True)
    out = (shot * tl.num_programs(1) + column_tile) * query_rows + row
    tl.store(row_values + out, value, mask=row < query_rows)
    tl.store(row_indices + out, tl.minimum(column_tile * BLOCK_S + index, support_rows - 1), mask=row < query_rows)
    value, index = tl.max(products, 0, return_indices=True)
    out = (shot * tl.num_programs(0) + row_tile) * support_rows + column
    tl.store(column_values + out, value, mask=column < support_rows)
    tl.store(column_indices + out, tl.minimum(row_tile * BLOCK_Q + index, query_rows - 1), mask=column < support_rows)


@jit
def _best_of_tiles(  # type: ignore[no-untyped-def]
    tile_values, tile_indices, groups, tiles, rows, values, indices, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(groups, tiles, rows) -> the best value of every row and its index, -1 where all are -inf.

    Tiles are in the order of their indices, so the first of equal ones holds the smallest index.
    """
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    first = group * tiles * rows + row
    step = tl.arange(0, TILES)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    winner = tl.zeros((ROWS,), tl.int32)
    for start in range(0, tiles, TILES):
        tile = start + step
        some = tl.load(
            tile_values + first[None, :] + tile[:, None] * rows,
            mask=inside[None, :] & (tile < tiles)[:, None],
            other=-float("inf"),
        )
        value, at = tl.max(some, 0, return_indices=True)
        winner = tl.where(value > best, start + at, winner)
        best = tl.maximum(value, best)
    index = tl.load(tile_indices + first + winner * rows, mask=inside, other=-1)
    tl.store(values + group * rows + row, best, mask=inside)
    tl.store(indices + group * rows + row, tl.where(best == -float("inf"), -1, index).to(tl.int64), mask=inside)


# --- Configurations and launchers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One fixed configuration of the matrix kernels."""

    block_q: int
    block_s: int
    block_c: int
    num_warps: int
    num_stages: int
    precision: Literal["ieee", "tf32x3"]

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_S": self.block_s,
            "BLOCK_C": self.block_c,
            "PRECISION": self.precision,
            "UP": runtime.upcast(dtype),
        }


# By bytes of an element. Three TF32 products give float32 its precision back, in the matrix units.
TILES = {2: Tile(128, 128, 64, 8, 3, "ieee"), 4: Tile(64, 64, 32, 8, 3, "tf32x3")}
# What kernels are shipped for, by Triton's names.
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# `_best_of_tiles`: tiles read at a time, rows of a program.
REDUCTION = {"TILES": 16, "ROWS": 64}
REDUCTION_WARPS = 4
# `_unit_rows`: elements that a program keeps in registers, and the longest row.
UNIT_ROWS_ELEMENTS, UNIT_ROWS_WARPS, LONGEST_ROW = 4096, 4, 8192


def _launch_unit_rows(rows: torch.Tensor, eps: float, half: bool) -> torch.Tensor:
    channels = rows.shape[-1]
    if rows.dtype == torch.float64:
        raise runtime.UnsupportedError("kernels compute in float32, not in float64")
    if channels > LONGEST_ROW:
        raise runtime.UnsupportedError(f"rows have {channels} channels, the kernel takes {LONGEST_ROW} at most")
    rows = runtime.packed(rows, 1)
    unit = torch.empty(rows.shape, dtype=torch.float16 if half else rows.dtype, device=rows.device)
    count = rows.numel() // channels
    constants = _unit_rows_constants(channels)
    _unit_rows[(_cdiv(count, constants["ROWS"]),)](
        rows, count, channels, eps, unit, **constants, num_warps=UNIT_ROWS_WARPS, num_stages=1
    )
    return unit


def _unit_rows_constants(channels: int) -> dict[str, int]:
    width = max(16, 1 << (channels - 1).bit_length())
    return {"ROWS": max(1, UNIT_ROWS_ELEMENTS // width), "CHANNELS": width}


def _launch_masked_max(
    query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    tile = _tile(query.dtype)
    query, support = runtime.packed(query, CHANNEL_STEP), runtime.packed(support, CHANNEL_STEP)
    (shots, masks, columns), (rows, channels) = weights.shape, query.shape
    tiles = _cdiv(columns, tile.block_s)
    weights = runtime.packed(weights, tile.block_s)
    runtime.require_int32(
        query=query.numel(),
        support=support.numel(),
        weights=weights.numel(),
        tile_results=shots * masks * tiles * rows,
    )
    values, indices = _tile_results(query, shots * masks, tiles, rows)
    _masked_tile_maxima[_cdiv(rows, tile.block_q), tiles, shots](
        query, support, weights, shots, masks, rows, columns, channels, int(mode == "exclude"), values, indices,
        **tile.constants(query.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    best, index = _reduce_tiles(values, indices)
    return best.view(shots, masks, rows), index.view(shots, masks, rows)


def _launch_mutual_argmax(query: torch.Tensor, support: torch.Tensor) -> Matches:
    tile = _tile(query.dtype)
    query, support = runtime.packed(query, CHANNEL_STEP), runtime.packed(support, CHANNEL_STEP)
    (shots, columns, channels), rows = support.shape, len(query)
    row_tiles, column_tiles = _cdiv(rows, tile.block_q), _cdiv(columns, tile.block_s)
    runtime.require_int32(
        query=query.numel(),
        support=support.numel(),
        row_results=shots * column_tiles * rows,
        column_results=shots * row_tiles * columns,
    )
    of_rows = _tile_results(query, shots, column_tiles, rows)
    of_columns = _tile_results(query, shots, row_tiles, columns)
    _mutual_tile_maxima[row_tiles, column_tiles, shots](
        query, support, shots, rows, columns, channels, *of_rows, *of_columns,
        **tile.constants(query.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return *_reduce_tiles(*of_rows), *_reduce_tiles(*of_columns)


def _tile(dtype: torch.dtype) -> Tile:
    if dtype == torch.float64:
        raise runtime.UnsupportedError("kernels compute in float32, not in float64")
    return TILES[dtype.itemsize]


def _tile_results(like: torch.Tensor, groups: int, tiles: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (groups, tiles, rows)
    return (
        torch.empty(shape, dtype=torch.float32, device=like.device),
        torch.empty(shape, dtype=torch.int32, device=like.device),
    )


def _reduce_tiles(tile_values: torch.Tensor, tile_indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups, tiles, rows = tile_values.shape
    values = torch.empty(groups, rows, dtype=torch.float32, device=tile_values.device)
    indices = torch.empty(groups, rows, dtype=torch.int64, device=tile_values.device)
    _best_of_tiles[_cdiv(rows, REDUCTION["ROWS"]), groups](
        tile_values, tile_indices, groups, tiles, rows, values, indices,
        **REDUCTION, num_warps=REDUCTION_WARPS, num_stages=1,
    )  # fmt: skip
    return values, indices


def _cdiv(total: int, part: int) -> int:
    return -(-total // part)


# --- Operations ------------------------------------------------------------------------------------------------------


def unit_rows(rows: torch.Tensor, eps: float = 1e-12, half: bool = True) -> torch.Tensor:
    """Rows of length one: rows / max(|row|, eps), computed in float32 (float64 for float64).

    rows: (..., C). Returns (..., C), float16 with `half`, else of the dtype of `rows`; rows of zeros stay zeros.
    Differentiable. InputError (kernel_input) for tensors that are empty or not floating, and for eps under 1e-37.
    """
    if onnx_node.tracing():
        dtype = torch.float16 if half else rows.dtype
        return onnx_node.node("UnitRows", [rows], {"eps": eps, "half": int(half)}, [(dtype, rows.shape)])[0]
    return torch.ops.fssdeploy.unit_rows(rows, eps, half)


def masked_means(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of every query row's inner products with a shot's support rows, without forming them.

    query (Nq, C), support (k, Ns, C), weights (k, M, Ns) -> (k, M, Nq) of the same dtype, computed in float32 (float64
    for float64): sum_j w_j <q_i, s_j> / sum_j w_j, zero where the weights add up to zero. Differentiable in all three.
    InputError (kernel_input) for shapes, dtypes or devices that do not fit together.
    """
    if onnx_node.tracing():
        shape = (*weights.shape[:2], query.shape[0])
        return onnx_node.node("MaskedMeans", [query, support, weights], {}, [(query.dtype, shape)])[0]
    return torch.ops.fssdeploy.masked_means(query, support, weights)


def masked_max(
    query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str = "multiply"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best weighted match of every query row among a shot's support rows, and where it is.

    query (Nq, C), support (k, Ns, C), weights (k, M, Ns) -> values (k, M, Nq) float32 (float64 for float64) and indices
    (k, M, Nq) int64: max_j w_j <q_i, s_j>, of equal ones the smallest j. With "multiply" (soft masks, GF-SAM) a weight
    of zero competes with the value 0; with "exclude" (hard masks, PFENet) it does not compete, and where nothing does
    the value is -inf and the index -1. Values are differentiable in query, support and weights through the best match.
    InputError (kernel_input) for shapes, dtypes or devices that do not fit together, or another mode.
    """
    if onnx_node.tracing():
        shape = (*weights.shape[:2], query.shape[0])
        outputs = [(_wide_dtype(query.dtype), shape), (torch.int64, shape)]
        attributes = {"exclude": int(mode == "exclude")}
        values, indices = onnx_node.node("MaskedMax", [query, support, weights], attributes, outputs)
        return values, indices
    return torch.ops.fssdeploy.masked_max(query, support, weights, mode)


def mutual_argmax(
    query: torch.Tensor, support: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best match of every query row among a shot's support rows and the reverse, from one product.

    query (Nq, C), support (k, Ns, C) -> row_values (k, Nq), row_indices (k, Nq) into support, column_values (k, Ns),
    column_indices (k, Ns) into query; values float32 (float64 for float64), indices int64, of equal values the smallest
    index. Values are differentiable through the best matches. InputError (kernel_input) for shapes, dtypes or devices
    that do not fit together.
    """
    if onnx_node.tracing():
        sides = [(support.shape[0], query.shape[0]), tuple(support.shape[:2])]
        outputs = [(dtype, shape) for shape in sides for dtype in (_wide_dtype(query.dtype), torch.int64)]
        best, index, column_best, column_index = onnx_node.node("MutualArgmax", [query, support], {}, outputs)
        return best, index, column_best, column_index
    return torch.ops.fssdeploy.mutual_argmax(query, support)


@torch.library.custom_op("fssdeploy::unit_rows", mutates_args=())
def _unit_rows_op(rows: torch.Tensor, eps: float, half: bool) -> torch.Tensor:
    _check_unit_rows(rows, eps)
    channels = rows.shape[-1]
    return dispatch.run(
        "unit_rows",
        rows,
        {"rows": rows.numel() // channels, "channels": channels},
        reference=lambda: unit_rows_reference(rows, eps, half),
        kernel=lambda: _launch_unit_rows(rows, eps, half),
    )


@_unit_rows_op.register_fake
def _(rows: torch.Tensor, eps: float, half: bool) -> torch.Tensor:
    _check_unit_rows(rows, eps)
    return rows.new_empty(rows.shape, dtype=torch.float16 if half else rows.dtype)


@torch.library.custom_op("fssdeploy::masked_means", mutates_args=())
def _masked_means_op(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_masked("masked_means", query, support, weights)
    reference = lambda: masked_means_reference(query, support, weights)  # noqa: E731
    return dispatch.run("masked_means", query, _sizes(query, support), reference=reference, kernel=None)


@_masked_means_op.register_fake
def _(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_masked("masked_means", query, support, weights)
    return query.new_empty((*weights.shape[:2], query.shape[0]))


@torch.library.custom_op("fssdeploy::masked_max", mutates_args=())
def _masked_max_op(
    query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_masked("masked_max", query, support, weights, mode)
    return dispatch.run(
        "masked_max",
        query,
        _sizes(query, support),
        reference=lambda: masked_max_reference(query, support, weights, mode),
        kernel=lambda: _launch_masked_max(query, support, weights, mode),
    )


@_masked_max_op.register_fake
def _(
    query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_masked("masked_max", query, support, weights, mode)
    return _fake_maxima(query, (*weights.shape[:2], query.shape[0]))


@torch.library.custom_op("fssdeploy::mutual_argmax", mutates_args=())
def _mutual_argmax_op(
    query: torch.Tensor, support: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_features("mutual_argmax", query, support)
    return dispatch.run(
        "mutual_argmax",
        query,
        _sizes(query, support),
        reference=lambda: mutual_argmax_reference(query, support),
        kernel=lambda: _launch_mutual_argmax(query, support),
    )


@_mutual_argmax_op.register_fake
def _(query: torch.Tensor, support: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_features("mutual_argmax", query, support)
    shots, columns = support.shape[:2]
    return *_fake_maxima(query, (shots, query.shape[0])), *_fake_maxima(query, (shots, columns))


def _fake_maxima(like: torch.Tensor, shape: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return like.new_empty(shape, dtype=_wide_dtype(like.dtype)), like.new_empty(shape, dtype=torch.int64)


def _sizes(query: torch.Tensor, support: torch.Tensor) -> dict[str, int]:
    return {"shots": support.shape[0], "query": query.shape[0], "support": support.shape[1], "channels": query.shape[1]}


def _check_unit_rows(rows: torch.Tensor, eps: float) -> None:
    contract.require_alike("unit_rows", rows=rows)
    if rows.dim() == 0:
        contract.refuse("unit_rows", "rows is a single number", "its last dimension is normalised")
    contract.require_some("unit_rows", elements=rows.numel())
    if not eps >= SMALLEST_EPS:
        contract.refuse("unit_rows", f"eps is {eps}", f"it needs at least {SMALLEST_EPS}, which float32 can hold")


def _check_features(operation: str, query: torch.Tensor, support: torch.Tensor) -> None:
    contract.require_rank(operation, query=(query, 2), support=(support, 3))
    contract.require_alike(operation, query=query, support=support)
    contract.require_equal(operation, "channels", query=query.shape[1], support=support.shape[2])
    contract.require_some(
        operation,
        query_rows=query.shape[0],
        support_rows=support.shape[1],
        shots=support.shape[0],
        channels=query.shape[1],
    )


def _check_masked(
    operation: str, query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor, mode: str = "multiply"
) -> None:
    _check_features(operation, query, support)
    contract.require_rank(operation, weights=(weights, 3))
    contract.require_alike(operation, query=query, weights=weights)
    contract.require_equal(operation, "shots", support=support.shape[0], weights=weights.shape[0])
    contract.require_equal(operation, "support rows", support=support.shape[1], weights=weights.shape[2])
    contract.require_some(operation, masks=weights.shape[1])
    if mode not in MODES:
        contract.refuse(operation, f"mode is {mode!r}", f"it is one of {', '.join(MODES)}")


# --- Gradients -------------------------------------------------------------------------------------------------------
# Sums over rows that share a match go through index_put, which sorts first: the same result every time, also on GPUs.


def _save_unit_rows(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, ctx.eps, _ = inputs
    ctx.save_for_backward(rows)


def _unit_rows_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (rows,) = ctx.saved_tensors
    exact, gradient = _wide(rows), gradient.to(_wide_dtype(rows.dtype))
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    norm = length.clamp(min=ctx.eps)
    unit = exact / norm
    along = torch.where(length > ctx.eps, (gradient * unit).sum(-1, keepdim=True), 0)
    return ((gradient - along * unit) / norm).to(rows.dtype), None, None


def _save_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _masked_means_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = ctx.saved_tensors[0].dtype
    query, support, weights, gradient = map(_wide, (*ctx.saved_tensors, gradient))
    means, inverse = _support_means(support, weights)
    to_means = gradient @ query * inverse  # the gradient of weights @ support, (k, M, C)
    of_query = gradient.flatten(0, 1).T @ means.flatten(0, 1)
    of_support = weights.transpose(1, 2) @ to_means
    of_weights = to_means @ support.transpose(1, 2) - (to_means * means).sum(2, keepdim=True)
    return of_query.to(dtype), of_support.to(dtype), of_weights.to(dtype)


def _save_masked_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, support, weights, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, support, weights, output[1])


def _masked_max_backward(
    ctx: Any, gradient: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    query, support, weights, indices = ctx.saved_tensors
    dtype, query, support, weights = query.dtype, _wide(query), _wide(support), _wide(weights)
    gradient = torch.where(indices >= 0, gradient, 0)
    index = indices.clamp(min=0)
    shot = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1).expand_as(index)
    mask = torch.arange(index.shape[1], device=index.device).view(1, -1, 1).expand_as(index)
    match = support[shot, index]  # (k, M, Nq, C)
    to_product = (gradient * weights[shot, mask, index]).unsqueeze(-1)
    of_query = (to_product * match).sum((0, 1))
    of_support = torch.zeros_like(support).index_put((shot, index), to_product * query, accumulate=True)
    to_weight = gradient * (match * query).sum(-1)
    of_weights = torch.zeros_like(weights).index_put((shot, mask, index), to_weight, accumulate=True)
    return of_query.to(dtype), of_support.to(dtype), of_weights.to(dtype), None


def _save_mutual_argmax(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.save_for_backward(*inputs, output[1], output[3])


def _mutual_argmax_backward(
    ctx: Any, of_rows: torch.Tensor, _: torch.Tensor, of_columns: torch.Tensor, __: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    query, support, *indices = ctx.saved_tensors
    dtype, query, support = query.dtype, _wide(query), _wide(support)
    row_index, column_index = (index.clamp(min=0) for index in indices)
    shot = torch.arange(row_index.shape[0], device=row_index.device).view(-1, 1).expand_as(row_index)
    of_rows, of_columns = of_rows.unsqueeze(-1), of_columns.unsqueeze(-1)
    of_query = (of_rows * support[shot, row_index]).sum(0)
    of_query = of_query.index_put((column_index,), of_columns * support, accumulate=True)
    of_support = (of_columns * query[column_index]).index_put((shot, row_index), of_rows * query, accumulate=True)
    return of_query.to(dtype), of_support.to(dtype)


_unit_rows_op.register_autograd(_unit_rows_backward, setup_context=_save_unit_rows)
_masked_means_op.register_autograd(_masked_means_backward, setup_context=_save_inputs)
_masked_max_op.register_autograd(_masked_max_backward, setup_context=_save_masked_max)
_mutual_argmax_op.register_autograd(_mutual_argmax_backward, setup_context=_save_mutual_argmax)


# --- Ahead of time ---------------------------------------------------------------------------------------------------


def shipped() -> tuple[ShippedKernel, ...]:
    """The configurations that the launchers use: any channel count that is a multiple of 64, any number of masks.

    `unit_rows` is shipped for rows of 513 to 1024 channels, the backbones' width.
    """
    return (_shipped_reduction(), *(kernel for dtype in TYPES for kernel in _shipped_for(dtype)))


def _shipped_for(dtype: torch.dtype) -> tuple[ShippedKernel, ...]:
    tile, pointer = TILES[dtype.itemsize], f"*{TYPES[dtype]}"
    constants = tile.constants(dtype) | {"UP": False}
    features = {"query": pointer, "support": pointer}
    sizes = dict.fromkeys(("query_rows", "support_rows", "channels"), "i32")
    maxima = {"values": "*fp32", "indices": "*i32"}
    sides = {f"{side}_{name}": kind for side in ("row", "column") for name, kind in maxima.items()}
    signatures: dict[tuple[str, Any], dict[str, str]] = {
        ("masked_max", _masked_tile_maxima): {
            **features,
            "weights": pointer,
            "shots": "i32",
            "masks": "i32",
            **sizes,
            "exclude": "i32",
            **maxima,
        },
        ("mutual_argmax", _mutual_tile_maxima): {**features, "shots": "i32", **sizes, **sides},
    }
    products = tuple(
        ShippedKernel(
            f"{name}_{TYPES[dtype]}",
            function,
            signature | dict.fromkeys(constants, "constexpr"),
            constants,
            aligned=(*(argument for argument, kind in signature.items() if kind.startswith("*")), "channels"),
            grid=("cdiv(query_rows, BLOCK_Q)", "cdiv(support_rows, BLOCK_S)", "shots"),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for (name, function), signature in signatures.items()
    )
    return _shipped_unit_rows(dtype), *products


def _shipped_unit_rows(dtype: torch.dtype) -> ShippedKernel:
    constants = _unit_rows_constants(1024)
    signature = {"rows": f"*{TYPES[dtype]}", "row_count": "i32", "channels": "i32", "eps": "fp32", "unit": "*fp16"}
    return ShippedKernel(
        f"unit_rows_{TYPES[dtype]}",
        _unit_rows,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        aligned=("rows", "channels", "unit"),
        grid=("cdiv(row_count, ROWS)", "1", "1"),
        num_warps=UNIT_ROWS_WARPS,
        num_stages=1,
        matrix=False,
        copies=0,
    )


def _shipped_reduction() -> ShippedKernel:
    tiles = {"tile_values": "*fp32", "tile_indices": "*i32"}
    sizes = dict.fromkeys(("groups", "tiles", "rows"), "i32")
    results = {"values": "*fp32", "indices": "*i64"}
    return ShippedKernel(
        "best_of_tiles",
        _best_of_tiles,
        tiles | sizes | results | dict.fromkeys(REDUCTION, "constexpr"),
        REDUCTION,
        aligned=(*tiles, *results),
        grid=("cdiv(rows, ROWS)", "groups", "1"),
        num_warps=REDUCTION_WARPS,
        num_stages=1,
        matrix=False,
        copies=0,
    )
