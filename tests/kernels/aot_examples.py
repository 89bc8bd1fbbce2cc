"""Kernels for the tests of the ahead-of-time gate: one that holds, and one for each promise that can be broken."""

from __future__ import annotations

from dataclasses import replace

from fssdeploy.kernels.runtime import jit, tl
from fssdeploy.kernels.shipped_kernel import ShippedKernel


@jit
def _products(  # type: ignore[no-untyped-def]
    query, support, largest, query_rows, support_rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    step = tl.arange(0, 64)
    first = query + tl.minimum(rows, query_rows - 1)[:, None] * channels + step[None, :]
    second = support + tl.minimum(columns, support_rows - 1)[:, None] * channels + step[None, :]
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for channel in range(0, channels, 64):
        products = tl.dot(tl.load(first + channel), tl.load(second + channel).T, products)
    tl.store(largest + rows, tl.max(products, 1), mask=rows < query_rows)


@jit
def _doubled(values, doubles, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(doubles + places, 2 * tl.load(values + places, mask=places < count), mask=places < count)


@jit
def _mismatched(values, doubles, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(doubles + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


_TILE = {"ROWS": 64, "COLUMNS": 64}
HOLDS = ShippedKernel(
    name="products_fp16",
    function=_products,
    signature={
        **dict.fromkeys(("query", "support"), "*fp16"),
        "largest": "*fp32",
        **dict.fromkeys(("query_rows", "support_rows", "channels"), "i32"),
        **dict.fromkeys(_TILE, "constexpr"),
    },
    constexprs=_TILE,
    aligned=("query", "support", "largest", "channels"),
    grid=("cdiv(query_rows, ROWS)", "1", "1"),
    num_warps=8,
    num_stages=3,
)
SPILLS = replace(HOLDS, name="spills", constexprs={"ROWS": 64, "COLUMNS": 128}, num_warps=1)
MUCH_SHARED = replace(HOLDS, name="much_shared", constexprs={"ROWS": 128, "COLUMNS": 128}, num_warps=8, num_stages=5)
UNALIGNED = replace(HOLDS, name="unaligned", aligned=())
# The newer matrix units take 64 rows or more.
FEW_ROWS = replace(HOLDS, name="few_rows", constexprs={"ROWS": 16, "COLUMNS": 64})
NO_MATRIX = ShippedKernel(
    name="no_matrix",
    function=_doubled,
    signature={"values": "*fp32", "doubles": "*fp32", "count": "i32", "BLOCK": "constexpr"},
    constexprs={"BLOCK": 256},
    aligned=("values", "doubles"),
    grid=("cdiv(count, BLOCK)", "1", "1"),
    num_warps=4,
    num_stages=1,
    copies=0,
)
MISMATCHED = replace(NO_MATRIX, name="mismatched", function=_mismatched)


def shipped() -> tuple[ShippedKernel, ...]:
    return HOLDS, replace(NO_MATRIX, name="doubled", matrix=False)
