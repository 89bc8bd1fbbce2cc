"""Calibrated attention without a matrix of queries x keys, forward and backward, for kernels.scma.

The forward pass finds the range of the calibrated logits, attends split by split over the keys, and merges the splits
by their log-sum-exp; the backward passes compute every weight again from log-sum-exp and range. Sums run in float32
and in a fixed order: two runs are equal to the last bit. Operands have 16 bits (float32 in the interpreter alone). No
loop has a mask along the channels, and rows out of range are clamped: copies stay 16 bytes wide.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fssdeploy.kernels import runtime
from fssdeploy.kernels.runtime import UnsupportedError, jit, tl
from fssdeploy.kernels.shipped_kernel import ShippedKernel

# Widths that the kernels are made for; narrower tensors are padded with zeros.
CHANNELS = (64, 128, 256)
VALUE_CHANNELS = (64, 256)
# Blocks that fill a GPU: the keys are split until there are so many, whatever the device, for results that do not
# depend on it.
BLOCKS = 256


@dataclass(frozen=True)
class Tiles:
    """What one block computes at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int = 2


# Without register spills from compute capability 8.0 to 12.0; shared memory within the 99 KB of 8.6, 8.9 and 12.0.
RANGE = Tiles(64, 64, 4)
FORWARD = {64: Tiles(64, 32, 4), 256: Tiles(64, 32, 8)}
# Gradients of keys and of values together (whether keys, whether values, tiles), or apart where both sums do not fit in
# the registers.
KEY_GRADIENTS = {
    64: ((True, True, Tiles(32, 64, 8)),),
    256: ((True, False, Tiles(16, 64, 8)), (False, True, Tiles(32, 64, 8))),
}
QUERY_GRADIENTS = {64: Tiles(64, 32, 8), 256: Tiles(64, 16, 8)}
MERGE = Tiles(32, 0, 4, 1)


@jit
def _attended_logits(logits, low, slope, offset, cap):  # type: ignore[no-untyped-def]
    """Logits with their bias, to base 2. `offset` is infinite where nothing is calibrated, `cap` -inf past the end."""
    return logits * 1.4426950408889634 + tl.minimum(cap, (logits - low) * slope + offset)


@jit
def _query_range(low, high, place, strength):  # type: ignore[no-untyped-def]
    """`low` and `slope` of `_attended_logits` for a tile of queries."""
    least = tl.load(low + place)
    return least, strength * 1.4426950408889634 / (tl.load(high + place) - least + 1e-7)


@jit
def _columns(calibration, key, end, start, count, strength):  # type: ignore[no-untyped-def]
    """`offset` and `cap` of `_attended_logits` for a tile of keys; `calibration` points to this batch entry."""
    place = key - start
    inside = (place >= 0) & (place < count)
    confidence = tl.load(calibration + place, mask=inside, other=0.0)
    offset = tl.where(inside, strength * 1.4426950408889634 * (confidence - 1.0), float("inf"))
    cap = tl.where(key < end, 0.0, float("-inf"))
    return offset, cap


@jit
def _tile(pointer, row, rows, WIDTH: tl.constexpr, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `row` of a matrix of `rows` rows of WIDTH elements; those past the end repeat the last."""
    tile = tl.load(pointer + tl.minimum(row, rows - 1)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    return tile.to(tl.float32) if UP else tile


@jit
def range_kernel(  # type: ignore[no-untyped-def]
    query, keys, parts, batches, query_count, key_count, start, count, chunk, scale, C: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Least calibrated logit of every query, and least negative one, among `chunk` keys: (2, splits, B, N)."""
    batch = tl.program_id(0) % batches
    row = tl.program_id(0) // batches * QUERIES + tl.arange(0, QUERIES)
    split = tl.program_id(1)
    q = _tile(query + batch * query_count * C, row, query_count, C, UP)
    low = tl.full([QUERIES], float("inf"), tl.float32)
    high = tl.full([QUERIES], float("-inf"), tl.float32)
    last = tl.minimum(split * chunk + chunk, count)
    for begin in range(split * chunk, last, KEYS):
        # The last tile repeats the last key, which changes no extreme.
        k = _tile(keys + (batch * key_count + start) * C, begin + tl.arange(0, KEYS), last, C, UP)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        low = tl.minimum(low, tl.min(logits, 1))
        high = tl.maximum(high, tl.max(logits, 1))
    target = parts + (split * batches + batch) * query_count + row
    inside = row < query_count
    tl.store(target, low, mask=inside)
    tl.store(target + tl.num_programs(1) * batches * query_count, -high, mask=inside)


@jit
def forward_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, calibration, low, high, partial, partial_lse, batches, query_count, key_count, start, count,
    chunk, scale, strength, C: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Attention to `chunk` keys: (splits, B, N, V) and its log-sum-exp (splits, B, N)."""
    batch = tl.program_id(0) % batches
    row = tl.program_id(0) // batches * QUERIES + tl.arange(0, QUERIES)
    split = tl.program_id(1)
    q = _tile(query + batch * query_count * C, row, query_count, C, UP)
    place = batch * query_count + tl.minimum(row, query_count - 1)
    least, slope = _query_range(low, high, place, strength)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, V], tl.float32)
    last = tl.minimum(split * chunk + chunk, key_count)
    for begin in range(split * chunk, last, KEYS):
        key = begin + tl.arange(0, KEYS)
        k = _tile(keys + batch * key_count * C, key, key_count, C, UP)
        offset, cap = _columns(calibration + batch * count, key, last, start, count, strength)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = _attended_logits(logits, least[:, None], slope[:, None], offset[None, :], cap[None, :])
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(logits - new_peak[:, None])
        v = _tile(values + batch * key_count * V, key, key_count, V, UP)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    inside = row < query_count
    place = (split * batches + batch) * query_count + row
    tl.store(partial_lse + place, (peak + tl.log2(total)) * 0.6931471805599453, mask=inside)
    target = partial + place[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(target, sums / total[:, None], mask=inside[:, None])


@jit
def merge_kernel(  # type: ignore[no-untyped-def]
    partial, partial_lse, output, lse, rows, splits, V: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The attention to all keys from that to the splits: (rows, V) and its log-sum-exp (rows,)."""
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = row < rows
    clamped = tl.minimum(row, rows - 1)
    channel = tl.arange(0, V)[None, :]
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, V], tl.float32)
    for split in range(splits):
        place = split * rows + clamped
        share = tl.load(partial_lse + place)
        new_peak = tl.maximum(peak, share)
        shrink = tl.exp(peak - new_peak)
        weight = tl.exp(share - new_peak)
        sums = sums * shrink[:, None] + weight[:, None] * tl.load(partial + place[:, None] * V + channel)
        total = total * shrink + weight
        peak = new_peak
    tl.store(lse + row, peak + tl.log(total), mask=inside)
    target = output + row[:, None] * V + channel
    tl.store(target, (sums / total[:, None]).to(output.dtype.element_ty), mask=inside[:, None])


@jit
def key_gradients_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, calibration, low, high, lse, delta, gradient, key_gradient, value_gradient, batches,
    query_count, key_count, start, count, scale, strength, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    C: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys, of values or of both, over all queries.

    Logits are transposed, keys x queries: the side of the accumulators has the 64 rows that the matrix units of
    compute capability 9.0 and 10.0 need.
    """
    batch = tl.program_id(0) % batches
    key = tl.program_id(0) // batches * KEYS + tl.arange(0, KEYS)
    k = _tile(keys + batch * key_count * C, key, key_count, C, UP)
    v = _tile(values + batch * key_count * V, key, key_count, V, UP)
    offset, cap = _columns(calibration + batch * count, key, key_count, start, count, strength)
    dk = tl.zeros([KEYS, C], tl.float32)
    dv = tl.zeros([KEYS, V], tl.float32)
    for begin in range(0, query_count, QUERIES):
        row = begin + tl.arange(0, QUERIES)
        place = batch * query_count + tl.minimum(row, query_count - 1)
        least, slope = _query_range(low, high, place, strength)
        # Rows past the end weigh nothing: exp2(-inf).
        total = tl.load(lse + place, mask=row < query_count, other=float("inf")) * 1.4426950408889634
        q = _tile(query + batch * query_count * C, row, query_count, C, UP)
        g = _tile(gradient + batch * query_count * V, row, query_count, V, UP)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        logits = _attended_logits(logits, least[None, :], slope[None, :], offset[:, None], cap[:, None])
        weights = tl.exp2(logits - total[None, :])
        if OF_VALUES:
            dv += tl.dot(weights.to(g.dtype), g, input_precision="ieee")
        if OF_KEYS:
            slopes = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - tl.load(delta + place)[None, :])
            dk += tl.dot(slopes.to(q.dtype), q, input_precision="ieee")
    inside = (key < key_count)[:, None]
    place = (batch * key_count + key)[:, None]
    if OF_KEYS:
        target = key_gradient + place * C + tl.arange(0, C)[None, :]
        tl.store(target, (dk * scale).to(key_gradient.dtype.element_ty), mask=inside)
    if OF_VALUES:
        target = value_gradient + place * V + tl.arange(0, V)[None, :]
        tl.store(target, dv.to(value_gradient.dtype.element_ty), mask=inside)


@jit
def query_gradients_kernel(  # type: ignore[no-untyped-def]
    query, keys, values, calibration, low, high, lse, delta, gradient, query_gradient, batches, query_count, key_count,
    start, count, scale, strength, C: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, over all keys."""
    batch = tl.program_id(0) % batches
    row = tl.program_id(0) // batches * QUERIES + tl.arange(0, QUERIES)
    q = _tile(query + batch * query_count * C, row, query_count, C, UP)
    g = _tile(gradient + batch * query_count * V, row, query_count, V, UP)
    place = batch * query_count + tl.minimum(row, query_count - 1)
    least, slope = _query_range(low, high, place, strength)
    total = tl.load(lse + place) * 1.4426950408889634
    centre = tl.load(delta + place)
    dq = tl.zeros([QUERIES, C], tl.float32)
    for begin in range(0, key_count, KEYS):
        key = begin + tl.arange(0, KEYS)
        k = _tile(keys + batch * key_count * C, key, key_count, C, UP)
        v = _tile(values + batch * key_count * V, key, key_count, V, UP)
        offset, cap = _columns(calibration + batch * count, key, key_count, start, count, strength)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = _attended_logits(logits, least[:, None], slope[:, None], offset[None, :], cap[None, :])
        weights = tl.exp2(logits - total[:, None])
        slopes = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - centre[:, None])
        dq += tl.dot(slopes.to(k.dtype), k, input_precision="ieee")
    target = query_gradient + (batch * query_count + row)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(target, (dq * scale).to(query_gradient.dtype.element_ty), mask=(row < query_count)[:, None])


def forward(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float,
    span: str,
    scale: float,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, N, V), log-sum-exp, low and high (B, N) of kernels.scma; `splits` of the keys instead of our choice.

    UnsupportedError for dtypes, widths and sizes that the kernels are not made for.
    """
    width = values.shape[2]
    query, keys, values = _fit(query, CHANNELS), _fit(keys, CHANNELS), _fit(values, VALUE_CHANNELS)
    calibration = calibration.float().contiguous()
    low, high = _ranges(query, keys, start, calibration.shape[1], span, scale, splits)
    batches, query_count, key_count = query.shape[0], query.shape[1], keys.shape[1]
    tiles = FORWARD[values.shape[2]]
    row_tiles = _ceildiv(query_count, tiles.queries) * batches
    chunk, splits = split_keys(key_count, tiles.keys, row_tiles, splits)
    partial = torch.empty((splits, *query.shape[:2], values.shape[2]), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=query.device)
    runtime.require_int32(partial=partial.numel())
    forward_kernel[row_tiles, splits](
        query, keys, values, calibration, low, high, partial, partial_lse,
        batches, query_count, key_count, start, calibration.shape[1], chunk, scale, strength,
        C=query.shape[2], V=values.shape[2], QUERIES=tiles.queries, KEYS=tiles.keys, UP=runtime.upcast(query.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    output = torch.empty(partial.shape[1:], dtype=query.dtype, device=query.device)
    lse = torch.empty(partial.shape[1:3], dtype=torch.float32, device=query.device)
    merge_kernel[(_ceildiv(lse.numel(), MERGE.queries),)](
        partial, partial_lse, output, lse, lse.numel(), splits, V=values.shape[2], QUERIES=MERGE.queries,
        num_warps=MERGE.num_warps, num_stages=MERGE.num_stages,
    )  # fmt: skip
    return output[:, :, :width].contiguous(), lse, low, high


def backward(
    gradient: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, keys and values from that of the output; errors as in `forward`."""
    width, value_width = query.shape[2], values.shape[2]
    delta = (gradient.float() * output.float()).sum(2)
    query, keys = _fit(query, CHANNELS), _fit(keys, CHANNELS)
    values, gradient = _fit(values, VALUE_CHANNELS), _fit(gradient, VALUE_CHANNELS)
    calibration = calibration.float().contiguous()
    batches, query_count, key_count = query.shape[0], query.shape[1], keys.shape[1]
    shared = (query, keys, values, calibration, low.contiguous(), high.contiguous(), lse.contiguous(), delta, gradient)
    sizes = (batches, query_count, key_count, start, calibration.shape[1], scale, strength)
    widths = {"C": query.shape[2], "V": values.shape[2], "UP": runtime.upcast(query.dtype)}

    def options(tiles: Tiles) -> dict[str, Any]:
        return widths | {
            "QUERIES": tiles.queries,
            "KEYS": tiles.keys,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    key_gradient, value_gradient, query_gradient = (torch.empty_like(each) for each in (keys, values, query))
    for of_keys, of_values, tiles in KEY_GRADIENTS[values.shape[2]]:
        grid = (_ceildiv(key_count, tiles.keys) * batches,)
        sides = {"OF_KEYS": of_keys, "OF_VALUES": of_values}
        key_gradients_kernel[grid](*shared, key_gradient, value_gradient, *sizes, **sides, **options(tiles))
    tiles = QUERY_GRADIENTS[values.shape[2]]
    grid = (_ceildiv(query_count, tiles.queries) * batches,)
    query_gradients_kernel[grid](*shared, query_gradient, *sizes, **options(tiles))
    return (
        query_gradient[:, :, :width].contiguous(),
        key_gradient[:, :, :width].contiguous(),
        value_gradient[:, :, :value_width].contiguous(),
    )


def shipped() -> tuple[ShippedKernel, ...]:
    """The kernels at the width of FSSAM, 256 channels, with values of 64 and of 256, in 16 bits."""
    kernels = []
    for dtype in ("fp16", "bf16"):
        kernels.append(_shipped("range", range_kernel, dtype, RANGE, {"C": 256}))
        for width in VALUE_CHANNELS:
            both = {"C": 256, "V": width}
            kernels += [
                _shipped("forward", forward_kernel, dtype, FORWARD[width], both),
                _shipped("merge", merge_kernel, dtype, MERGE, {"V": width}),
                _shipped("query_gradients", query_gradients_kernel, dtype, QUERY_GRADIENTS[width], both),
            ]
            for of_keys, of_values, tiles in KEY_GRADIENTS[width]:
                name = "key_gradients" if of_keys else "value_gradients"
                sides = {"OF_KEYS": of_keys, "OF_VALUES": of_values}
                kernels.append(_shipped(name, key_gradients_kernel, dtype, tiles, both | sides))
    return tuple(kernels)


def signature(kernel: Any, dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """Triton's types of the arguments of `kernel` for tensors of `dtype`, by their names."""
    types = dict.fromkeys(("scale", "strength"), "fp32")
    types |= dict.fromkeys(("calibration", "low", "high", "lse", "delta", "parts", "partial", "partial_lse"), "*fp32")
    tensors = ("query", "keys", "values", "gradient", "output", "logits")
    types |= dict.fromkeys((*tensors, "query_gradient", "key_gradient", "value_gradient"), f"*{dtype}")
    names = inspect.signature(getattr(kernel, "fn", kernel)).parameters
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}


def _shipped(name: str, kernel: Any, dtype: str, tiles: Tiles, constants: Mapping[str, Any]) -> ShippedKernel:
    names = inspect.signature(getattr(kernel, "fn", kernel)).parameters
    tile = {"QUERIES": tiles.queries, "KEYS": tiles.keys, "UP": False}
    constants = {**constants, **{each: value for each, value in tile.items() if each in names}}
    types = signature(kernel, dtype, constants)
    grids = {
        "merge": ("cdiv(rows, QUERIES)", "1", "1"),
        "key_gradients": ("cdiv(key_count, KEYS) * batches", "1", "1"),
        "value_gradients": ("cdiv(key_count, KEYS) * batches", "1", "1"),
        "query_gradients": ("cdiv(query_count, QUERIES) * batches", "1", "1"),
        "range": ("cdiv(query_count, QUERIES) * batches", "cdiv(count, chunk)", "1"),
        "forward": ("cdiv(query_count, QUERIES) * batches", "cdiv(key_count, chunk)", "1"),
    }
    width = "_".join(f"{each.lower()}{constants[each]}" for each in ("C", "V") if each in constants)
    return ShippedKernel(
        name=f"calibrated_attention_{name}_{dtype}_{width}",
        function=kernel,
        signature=types,
        constexprs=constants,
        aligned=tuple(each for each, kind in types.items() if kind.startswith("*")),
        grid=grids[name],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        matrix=name != "merge",
        copies=0 if name == "merge" else 1,
    )


def _ranges(
    query: torch.Tensor, keys: torch.Tensor, start: int, count: int, span: str, scale: float, splits: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest calibrated logit (B, N) float32; zeros where nothing is calibrated."""
    batches, query_count, channels = query.shape
    if count == 0:
        zeros = query.new_zeros((batches, query_count), dtype=torch.float32)
        return zeros, zeros.clone()
    row_tiles = _ceildiv(query_count, RANGE.queries) * batches
    chunk, splits = split_keys(count, RANGE.keys, row_tiles, splits)
    parts = torch.empty((2, splits, batches, query_count), dtype=torch.float32, device=query.device)
    range_kernel[row_tiles, splits](
        query, keys, parts, batches, query_count, keys.shape[1], start, count, chunk, scale,
        C=channels, QUERIES=RANGE.queries, KEYS=RANGE.keys, UP=runtime.upcast(query.dtype),
        num_warps=RANGE.num_warps, num_stages=RANGE.num_stages,
    )  # fmt: skip
    extremes = parts.amin((1, 3), keepdim=True)[:, 0] if span == "global" else parts.amin(1)
    low, negative_high = extremes.expand(2, batches, query_count)
    return low.contiguous(), -negative_high.contiguous()


def split_keys(keys: int, tile: int, row_tiles: int, splits: int | None) -> tuple[int, int]:
    """Keys of a split and how many splits there are: none is empty, for an empty one would divide 0 by 0."""
    tiles = _ceildiv(keys, tile)
    per_split = _ceildiv(tiles, splits or max(1, BLOCKS // row_tiles))
    return per_split * tile, _ceildiv(tiles, per_split)


def _fit(tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """`tensor` (B, N, width) as the kernels want it: a width they are made for, contiguous, aligned."""
    if tensor.dtype == torch.float64:
        raise UnsupportedError("kernels do not compute in float64")
    if tensor.dtype == torch.float32 and not runtime.INTERPRETED:
        raise UnsupportedError("tiles of float32 are too large for shared memory: this kernel takes 16 bits")
    width = next((each for each in widths if each >= tensor.shape[2]), None)
    if width is None:
        raise UnsupportedError(f"there is no kernel for {tensor.shape[2]} channels, the widest takes {widths[-1]}")
    tensor = runtime.packed(tensor, width)
    runtime.require_int32(tensor=tensor.numel())
    return tensor


def _ceildiv(count: int, size: int) -> int:
    return -(-count // size)
