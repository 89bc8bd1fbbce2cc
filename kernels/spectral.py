"""The graph over the cells of a query: edge weights and degrees in one pass (GSM, equations (2), (3), (5), (6)).

    E_ij = f(c_ij) * (exp(-d_ij^2 / (2 sigma^2)) + f(D[r_i, r_j])) * B(g)_ij,    degree_i = sum_j E_ij

c are the cosines of the cells, d their distance on the grid, D the similarity of their regions r, g = exp(evidence)
with the evidence S+ - S-; the choices of f and B are those of fssdeploy.glue.gsm.graph.

Contract: features (N, C) are rows of length 1 or 0 and finite; any strides (copied where a kernel needs it). Half
precision rounds the cosines of the reference and the edges, nothing else; degrees are summed in float32 before that.
Differentiable: features, table and evidence. Two runs give the same bits. Where B is symmetric, so is E, and the kernel
computes one half of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fssdeploy.kernels import contract, dispatch, onnx_node, runtime
from fssdeploy.kernels.runtime import jit, tl
from fssdeploy.kernels.shipped_kernel import ShippedKernel

OPERATION = "spectral_edges"


class Broadcast(NamedTuple):
    """B_ij = exp(row * evidence_i) * exp(column * evidence_j), or the mean of the two."""

    row: float
    column: float
    mean: bool = False

    @property
    def symmetric(self) -> bool:
        return self.row == self.column


BROADCASTS = {
    "product": Broadcast(1, 1),
    "geometric": Broadcast(0.5, 0.5),
    "mean": Broadcast(1, 1, mean=True),
    "row": Broadcast(1, 0),
    "column": Broadcast(0, 1),
    "none": Broadcast(0, 0),
}
# What becomes of a negative cosine; the kernel knows the rule by its place in this tuple.
NEGATIVES = ("shift", "clip", "exp", "keep")


def spectral_edges(
    features: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    evidence: torch.Tensor,
    height: int,
    width: int,
    sigma: float,
    broadcast: str = "product",
    negative: str = "shift",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges (N, N) in the dtype of `features`, and their row sums (N,), float32 (float64 for float64).

    `features` (N, C): unit rows of the N = height * width cells, row by row. `labels` (N,) int64: the region of each
    cell. `table` (R, R): similarity of the regions; `evidence` (N,): S+ - S-; both in the dtype of `features` or in
    float32. `sigma` is in cells. `broadcast` says what g = exp(evidence) does to an edge from i to j: "product"
    g_i g_j, "geometric" its root, "mean" their mean, "row" g_i, "column" g_j, "none" nothing. `negative` is f: "shift"
    (1 + c) / 2, "clip" at 0, "exp" exp(c - 1), "keep" c.

    InputError (kernel_input) for shapes, dtypes or devices that do not belong together and, on the CPU, for labels
    outside of the table; on other devices a label outside counts as the nearest inside in the kernel, and fails in the
    reference.
    """
    if onnx_node.tracing():
        _check(features, labels, table, evidence, height, width, sigma, broadcast, negative)
        cells = features.shape[0]
        attributes: dict[str, int | float | str] = {
            "height": height, "width": width, "sigma": sigma, "broadcast": broadcast, "negative": negative,
        }  # fmt: skip
        outputs = ((features.dtype, (cells, cells)), (_wide(features.dtype), (cells,)))
        edges, degree = onnx_node.node("SpectralEdges", (features, labels, table, evidence), attributes, outputs)
        return edges, degree
    return torch.ops.fssdeploy.spectral_edges(
        features, labels, table, evidence, height, width, sigma, broadcast, negative
    )


def reference(
    features: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    evidence: torch.Tensor,
    height: int,
    width: int,
    sigma: float,
    broadcast: str,
    negative: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula as it stands, in float32 (float64 for float64)."""
    wide = _wide(features.dtype)
    nearness = _nearness(labels, table, height, width, sigma, negative, wide)
    left, right = _factors(evidence.to(wide), broadcast)
    edges = _without_negatives(_cosines(features), negative) * nearness * _spread(left, right, broadcast)
    return edges.to(features.dtype), edges.sum(1)


def _cosines(features: torch.Tensor) -> torch.Tensor:
    return (features @ features.T).to(_wide(features.dtype))


def _nearness(
    labels: torch.Tensor, table: torch.Tensor, height: int, width: int, sigma: float, negative: str, wide: torch.dtype
) -> torch.Tensor:
    """K + f(D): how near two cells are on the grid and how alike their regions, (N, N)."""
    # A Gaussian of two cells is the product of one down and one across.
    gaussian = torch.kron(*(_gaussian(count, sigma, wide, labels.device) for count in (height, width)))
    return gaussian + _without_negatives(table.to(wide), negative)[labels][:, labels]


def _gaussian(count: int, sigma: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    index = torch.arange(count, dtype=dtype, device=device)
    return torch.exp((index[:, None] - index).square() * (-0.5 / sigma**2))


def _without_negatives(cosines: torch.Tensor, negative: str) -> torch.Tensor:
    if negative == "shift":
        return (cosines + 1) * 0.5
    if negative == "clip":
        return cosines.clamp_min(0)
    return torch.exp(cosines - 1) if negative == "exp" else cosines


def _slope(cosines: torch.Tensor, negative: str) -> torch.Tensor:
    """The derivative of `_without_negatives`."""
    if negative == "shift":
        return torch.full_like(cosines, 0.5)
    if negative == "clip":
        return (cosines > 0).to(cosines.dtype)
    return torch.exp(cosines - 1) if negative == "exp" else torch.ones_like(cosines)


def _factors(evidence: torch.Tensor, broadcast: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What B makes of rows and of columns: two vectors to multiply, or to add for the mean."""
    row, column, mean = BROADCASTS[broadcast]
    share = 0.5 if mean else 1.0
    return torch.exp(row * evidence) * share, torch.exp(column * evidence) * share


def _spread(left: torch.Tensor, right: torch.Tensor, broadcast: str) -> torch.Tensor:
    return left[:, None] + right if BROADCASTS[broadcast].mean else left[:, None] * right


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@jit
def _edges_kernel(  # type: ignore[no-untyped-def]
    features, labels, table, left, right, edges, partial, cells, channels, width, regions, rule, mean, decay,
    TILE: tl.constexpr, STEP: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of E, with its row sums; where E is symmetric its mirror image too, with the sums of the columns.

    `partial` (tiles, N): what each tile of a row adds to the degrees. `decay` is 1 / (2 sigma^2).
    """
    down = tl.program_id(1)
    across = tl.program_id(0)
    if SYMMETRIC:
        # Row r of the upper triangle has tiles - r tiles; with row tiles - 1 - r it fills a line of tiles + 1. The
        # middle row of an odd count fills its line with itself: the same tiles, computed twice.
        tiles = tl.cdiv(cells, TILE)
        first = across < tiles - down
        down = tl.where(first, down, tiles - 1 - down)
        across = tl.where(first, down + across, across - 1)
    i = down * TILE + tl.arange(0, TILE)
    j = across * TILE + tl.arange(0, TILE)
    i_inside = i < cells
    j_inside = j < cells
    i_cell = tl.minimum(i, cells - 1)  # clamped, not masked: a mask would break up the copies
    j_cell = tl.minimum(j, cells - 1)

    channel = tl.arange(0, STEP)
    cosine = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, channels, STEP):
        rows = tl.load(features + i_cell[:, None] * channels + (start + channel)[None, :])
        columns = tl.load(features + j_cell[:, None] * channels + (start + channel)[None, :])
        if UP:
            rows = rows.to(tl.float32)
            columns = columns.to(tl.float32)
        cosine = tl.dot(rows, tl.trans(columns), cosine, input_precision=PRECISION)
    if rule == 0:
        weight = (cosine + 1) * 0.5
    elif rule == 1:
        weight = tl.maximum(cosine, 0)
    elif rule == 2:
        weight = tl.exp(cosine - 1)
    else:
        weight = cosine

    y = (i_cell // width)[:, None] - (j_cell // width)[None, :]
    x = (i_cell % width)[:, None] - (j_cell % width)[None, :]
    nearness = tl.exp((y * y + x * x).to(tl.float32) * -decay)
    i_label = tl.minimum(tl.maximum(tl.load(labels + i_cell), 0), regions - 1)
    j_label = tl.minimum(tl.maximum(tl.load(labels + j_cell), 0), regions - 1)
    nearness += tl.load(table + i_label[:, None] * regions + j_label[None, :])

    i_factor = tl.load(left + i_cell)[:, None]
    j_factor = tl.load(right + j_cell)[None, :]
    weight *= nearness * tl.where(mean != 0, i_factor + j_factor, i_factor * j_factor)
    weight = tl.where(i_inside[:, None] & j_inside[None, :], weight, 0)

    tile = weight.to(edges.dtype.element_ty)
    tl.store(edges + i[:, None] * cells + j[None, :], tile, mask=i_inside[:, None] & j_inside[None, :])
    tl.store(partial + across * cells + i, tl.sum(weight, 1), mask=i_inside)
    if SYMMETRIC:
        mirrored = j_inside & (across != down)
        tl.store(edges + j[:, None] * cells + i[None, :], tl.trans(tile), mask=mirrored[:, None] & i_inside[None, :])
        tl.store(partial + down * cells + j, tl.sum(weight, 0), mask=mirrored)


# Larger tiles spill: the epilogue holds the sums, two coordinates and a look-up for every element.
TILE, WARPS, STAGES = 64, 8, 3
# Bytes of an element -> channels a step, precision of products. Three of TF32 parts keep float32 what it is.
STEPS = {2: (64, "ieee"), 4: (32, "tf32x3")}


def _launch(
    features: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    evidence: torch.Tensor,
    width: int,
    sigma: float,
    broadcast: str,
    negative: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    symmetric, mean = BROADCASTS[broadcast].symmetric, BROADCASTS[broadcast].mean
    constants = _constants(features.dtype, symmetric)
    features = runtime.packed(features, constants["STEP"])
    cells, channels = features.shape
    tiles = -(-cells // TILE)
    runtime.require_int32(edges=(tiles * TILE) ** 2, features=tiles * TILE * channels)
    left, right = _factors(evidence.float(), broadcast)
    seen = runtime.packed(_without_negatives(table.float(), negative), 1)
    edges = torch.empty((cells, cells), dtype=features.dtype, device=features.device)
    partial = torch.empty((tiles, cells), dtype=torch.float32, device=features.device)
    grid = (tiles + 1, -(-tiles // 2)) if symmetric else (tiles, tiles)
    _edges_kernel[grid](
        features,
        runtime.packed(labels.int(), 1),
        seen,
        left,
        right,
        edges,
        partial,
        cells,
        channels,
        width,
        len(seen),
        NEGATIVES.index(negative),
        int(mean),
        0.5 / sigma**2,
        **constants,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return edges, partial.sum(0)


def _constants(dtype: torch.dtype, symmetric: bool) -> dict[str, Any]:
    if dtype.itemsize not in STEPS:
        raise runtime.UnsupportedError(f"the kernel does not compute in {dtype}")
    step, precision = STEPS[dtype.itemsize]
    return {
        "TILE": TILE,
        "STEP": step,
        "SYMMETRIC": symmetric,
        "PRECISION": precision,
        "UP": runtime.upcast(dtype),
    }


@torch.library.custom_op("fssdeploy::spectral_edges", mutates_args=())
def _spectral_edges(
    features: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    evidence: torch.Tensor,
    height: int,
    width: int,
    sigma: float,
    broadcast: str,
    negative: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(features, labels, table, evidence, height, width, sigma, broadcast, negative)
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < len(table):
        contract.refuse(OPERATION, "there are labels outside of the table", f"the table has {len(table)} regions")
    return dispatch.run(
        OPERATION,
        features,
        {"cells": features.shape[0], "channels": features.shape[1]},
        reference=lambda: reference(features, labels, table, evidence, height, width, sigma, broadcast, negative),
        kernel=lambda: _launch(features, labels, table, evidence, width, sigma, broadcast, negative),
    )


@_spectral_edges.register_fake
def _(
    features: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    evidence: torch.Tensor,
    height: int,
    width: int,
    sigma: float,
    broadcast: str,
    negative: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(features, labels, table, evidence, height, width, sigma, broadcast, negative)
    cells = features.shape[0]
    return features.new_empty((cells, cells)), features.new_empty((cells,), dtype=_wide(features.dtype))


def _check(
    features: torch.Tensor,
    labels: torch.Tensor,
    table: torch.Tensor,
    evidence: torch.Tensor,
    height: int,
    width: int,
    sigma: float,
    broadcast: str,
    negative: str,
) -> None:
    contract.require_rank(
        OPERATION, features=(features, 2), labels=(labels, 1), table=(table, 2), evidence=(evidence, 1)
    )
    contract.require_alike(OPERATION, features=features)
    either = (features.dtype, torch.float32)
    for name, tensor, dtypes in (
        ("labels", labels, (torch.int64,)),
        ("table", table, either),
        ("evidence", evidence, either),
    ):
        if tensor.dtype not in dtypes or tensor.device != features.device:
            known = " or ".join(sorted({str(dtype) for dtype in dtypes}))
            why = f"it takes {known} on the device of the features, {features.device}"
            contract.refuse(OPERATION, f"{name} is {tensor.dtype} on {tensor.device}", why)
    (cells, channels), regions = features.shape, table.shape[0]
    contract.require_some(OPERATION, cells=cells, channels=channels, regions=regions)
    contract.require_equal(
        OPERATION, "cells", features=cells, labels=labels.shape[0], evidence=evidence.shape[0], grid=height * width
    )
    contract.require_equal(OPERATION, "regions", rows=regions, columns=table.shape[1])
    if not (math.isfinite(sigma) and sigma > 0):
        contract.refuse(OPERATION, f"sigma is {sigma}", "it is a distance in cells above 0")
    for option, value, choices in (("broadcast", broadcast, tuple(BROADCASTS)), ("negative", negative, NEGATIVES)):
        if value not in choices:
            contract.refuse(OPERATION, f"{option} cannot be '{value}'", "", f"Choose {' or '.join(choices)}.")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels, table, evidence, *ctx.options = inputs
    ctx.save_for_backward(features, labels, table, evidence)


def _backward(ctx: Any, d_edges: torch.Tensor, d_degree: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The chain rule through E, recomputed: gradients of the features, the table and the evidence."""
    features, labels, table, evidence = ctx.saved_tensors
    height, width, sigma, broadcast, negative = ctx.options
    wide = _wide(features.dtype)
    cosines = _cosines(features)
    weight = _without_negatives(cosines, negative)
    nearness = _nearness(labels, table, height, width, sigma, negative, wide)
    left, right = _factors(evidence.to(wide), broadcast)
    spread = _spread(left, right, broadcast)
    gradient = d_edges.to(wide) + d_degree[:, None]

    d_cosines = (gradient * nearness * spread * _slope(cosines, negative)).to(features.dtype)
    d_features = d_cosines @ features + d_cosines.T @ features

    member = (labels[:, None] == torch.arange(table.shape[0], device=labels.device)).to(wide)
    d_table = (member.T @ (gradient * weight * spread) @ member) * _slope(table.to(wide), negative)

    row, column, mean = BROADCASTS[broadcast]
    d_spread = gradient * weight * nearness
    d_left = d_spread.sum(1) if mean else d_spread @ right
    d_right = d_spread.sum(0) if mean else left @ d_spread
    d_evidence = row * d_left * left + column * d_right * right
    return d_features, None, d_table.to(table.dtype), d_evidence.to(evidence.dtype), None, None, None, None, None


_spectral_edges.register_autograd(_backward, setup_context=_setup_context)


def shipped() -> tuple[ShippedKernel, ...]:
    """Both forms of the graph."""
    pointers = ("features", "labels", "table", "left", "right", "edges", "partial")
    integers = ("cells", "channels", "width", "regions", "rule", "mean")
    return tuple(
        ShippedKernel(
            name=f"{OPERATION}_{form}_{short}",
            function=_edges_kernel,
            signature={
                **dict.fromkeys(pointers, "*fp32"),
                **dict.fromkeys(("features", "edges"), f"*{short}"),
                "labels": "*i32",
                **dict.fromkeys(integers, "i32"),
                "decay": "fp32",
                **dict.fromkeys(_constants(dtype, symmetric), "constexpr"),
            },
            constexprs=_constants(dtype, symmetric),
            aligned=(*pointers, "channels"),
            grid=grid,
            num_warps=WARPS,
            num_stages=STAGES,
        )
        for dtype, short in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for form, symmetric, grid in (
            ("symmetric", True, ("cdiv(cells, TILE) + 1", "cdiv(cdiv(cells, TILE), 2)", "1")),
            ("directed", False, ("cdiv(cells, TILE)", "cdiv(cells, TILE)", "1")),
        )
    )
