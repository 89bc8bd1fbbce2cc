"""Correlations of every query cell with every support cell, and what is projected from them.

Three forms: folded, where nothing stands between the correlation and a projection over the support cells, so that the
product is re-associated and the correlation never formed (FS-DINO, section 3.4.1, equations (3) to (5)); a stack of
ReLU cosines, one a layer (Min et al., "Hypercorrelation Squeeze for Few-Shot Segmentation", section 4.1); and ReLU then
projection, where a kernel keeps each piece of the correlation on the chip.

Contract: floating point tensors of one dtype, finite, with any strides (copied where a kernel needs it); half precision
is summed in float32, and correlations must lie in its range. All floating point inputs are differentiable. Two runs
give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from fssdeploy.kernels import contract, dispatch, onnx_node, runtime
from fssdeploy.kernels.runtime import jit, tl
from fssdeploy.kernels.shipped_kernel import ShippedKernel

# Added to the lengths of features, as in the code that came with HSNet; it lets rows without features correlate to 0.
EPSILON = 1e-5


def fold_projection(support: torch.Tensor, weights: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """A projection over the support cells, folded with the support: mean over shots of W diag(w) F_s, (P, C).

    `support` (k, Ns, C), `weights` (k, Ns) the masks, `projection` (P, Ns). What only the support decides is then
    computed once a class, and `folded_projection` is all that a query costs. InputError (kernel_input) for tensors that
    do not belong together.
    """
    if onnx_node.tracing():  # three standard operators: no node of their own
        _check_fold(support, weights, projection)
        return _fold(support, weights, projection)
    return torch.ops.fssdeploy.fold_projection(support, weights, projection)


def folded_projection(query: torch.Tensor, folded: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The projected correlation (Nq, P) of query rows (Nq, C), from `fold_projection` (P, C) and a bias (P,)."""
    return torch.nn.functional.linear(query, folded, bias)


def hypercorrelation(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """ReLU cosines (L, Nq, Ns) of L layers: query (L, Nq, C), support (L, Ns, C) times the mask `weights` (Ns,).

    The mask multiplies features before they are brought to length 1, so it matters only where it is zero or tiny.
    InputError (kernel_input) for tensors that do not belong together.
    """
    if onnx_node.tracing():
        _check_hypercorrelation(query, support, weights)
        outputs = [(query.dtype, (query.shape[0], query.shape[1], support.shape[1]))]
        return onnx_node.node("Hypercorrelation", (query, support, weights), {}, outputs)[0]
    return torch.ops.fssdeploy.hypercorrelation(query, support, weights)


def correlation_projection(query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """relu(q s^T) W for every shot, (k, Nq, P): query (Nq, C), support (k, Ns, C), projection W (k, Ns, P).

    Neither the kernel nor the backward pass ever holds Nq x Ns numbers. InputError (kernel_input) for tensors that do
    not belong together.
    """
    if onnx_node.tracing():
        _check_projection(query, support, projection)
        outputs = [(query.dtype, (support.shape[0], query.shape[0], projection.shape[2]))]
        return onnx_node.node("CorrelationProjection", (query, support, projection), {}, outputs)[0]
    return torch.ops.fssdeploy.correlation_projection(query, support, projection)


def _fold(support: torch.Tensor, weights: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    # All shots in one product, summed in the precision of the matrix units.
    masked = (projection[:, None] * (weights / weights.shape[0])).flatten(1)
    return masked @ support.flatten(0, 1)


def _hypercorrelation(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (_unit(query)[0] @ _unit(support * weights[:, None])[0].mT).relu()


def _unit(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (L, N, C) over their lengths + EPSILON, in their dtype; the lengths (L, N, 1) in float32 or better."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    length = wide.norm(dim=-1, keepdim=True)
    return (wide / (length + EPSILON)).to(features.dtype), length


def _projected(query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    return (query @ support.mT).relu() @ projection


@jit
def _correlation_projection_kernel(  # type: ignore[no-untyped-def]
    query, support, projection, output, shots, queries, supports, channels, outputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """WIDTH projected numbers of ROWS query rows with one shot: attention with a ReLU in the place of the softmax.

    `shots` is k, of which the grid is made.
    """
    shot = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = tl.minimum(row, queries - 1)  # clamped, not masked: a mask would break up the copies
    out = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    channel = tl.arange(0, STEP)
    support += shot * supports * channels
    projection += shot * supports * outputs
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, supports, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_inside = tl.minimum(column, supports - 1)
        correlation = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, channels, STEP):
            rows = tl.load(query + row_inside[:, None] * channels + (first + channel)[None, :])
            columns = tl.load(support + column_inside[:, None] * channels + (first + channel)[None, :])
            if UP:
                rows = rows.to(tl.float32)
                columns = columns.to(tl.float32)
            correlation = tl.dot(rows, tl.trans(columns), correlation, input_precision=PRECISION)
        correlation = tl.where((column < supports)[None, :], tl.maximum(correlation, 0), 0)
        weights = tl.load(projection + column_inside[:, None] * outputs + out[None, :])
        if UP:
            weights = weights.to(tl.float32)
        total = tl.dot(correlation.to(weights.dtype), weights, total, input_precision=PRECISION)
    output += shot * queries * outputs
    result = total.to(output.dtype.element_ty)
    tl.store(output + row[:, None] * outputs + out[None, :], result, mask=(row < queries)[:, None])


ROWS, WARPS, STAGES = 64, 8, 2
# Bytes of an element -> channels a step, precision of products, and the support rows at a time for each width of the
# result; more of any spills. Three products of TF32 parts keep float32 what it is.
TILES: dict[int, tuple[int, str, dict[int, int]]] = {
    2: (64, "ieee", {64: 64, 128: 64, 256: 32, 512: 32}),
    4: (32, "tf32x3", {64: 32, 128: 32}),
}


def _launch(query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    shots, supports, outputs = projection.shape
    constants = _constants(query.dtype, outputs)
    step, width = constants["STEP"], constants["WIDTH"]
    query, support = runtime.packed(query, step), runtime.packed(support, step)
    projection = runtime.packed(projection, width)
    (queries, channels), padded = query.shape, projection.shape[2]
    runtime.require_int32(
        query=(queries + ROWS) * channels, support=support.numel(), projection=projection.numel(),
        output=shots * (queries + ROWS) * padded,
    )  # fmt: skip
    output = torch.empty((shots, queries, padded), dtype=query.dtype, device=query.device)
    _correlation_projection_kernel[(-(-queries // ROWS), padded // width, shots)](
        query,
        support,
        projection,
        output,
        shots,
        queries,
        supports,
        channels,
        padded,
        **constants,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return output[..., :outputs].contiguous()


def _constants(dtype: torch.dtype, outputs: int) -> dict[str, Any]:
    """For the smallest width that holds all outputs; the largest is repeated, and the correlation with it."""
    if dtype.itemsize not in TILES:
        raise runtime.UnsupportedError(f"the kernel does not compute in {dtype}")
    step, precision, columns = TILES[dtype.itemsize]
    width = next((width for width in columns if width >= outputs), max(columns))
    return {
        "ROWS": ROWS,
        "COLUMNS": columns[width],
        "STEP": step,
        "WIDTH": width,
        "PRECISION": precision,
        "UP": runtime.upcast(dtype),
    }


@torch.library.custom_op("fssdeploy::fold_projection", mutates_args=())
def _fold_projection_op(support: torch.Tensor, weights: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    _check_fold(support, weights, projection)
    sizes = {"support": support.shape[1], "channels": support.shape[2]}
    return dispatch.run("fold_projection", support, sizes, lambda: _fold(support, weights, projection), kernel=None)


@_fold_projection_op.register_fake
def _(support: torch.Tensor, weights: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    _check_fold(support, weights, projection)
    return support.new_empty((projection.shape[0], support.shape[2]))


def _check_fold(support: torch.Tensor, weights: torch.Tensor, projection: torch.Tensor) -> None:
    name = "fold_projection"
    contract.require_rank(name, support=(support, 3), weights=(weights, 2), projection=(projection, 2))
    contract.require_alike(name, support=support, weights=weights, projection=projection)
    contract.require_equal(name, "shots", support=support.shape[0], weights=weights.shape[0])
    contract.require_equal(
        name, "support cells", support=support.shape[1], weights=weights.shape[1], projection=projection.shape[1]
    )
    contract.require_some(
        name, shots=support.shape[0], cells=support.shape[1], channels=support.shape[2], outputs=projection.shape[0]
    )


def _save_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _fold_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    support, weights, projection = ctx.saved_tensors
    share = weights / weights.shape[0]
    back = projection.T @ gradient  # (Ns, C): the gradient of one shot's masked features
    d_projection = gradient @ (support * share[..., None]).sum(0).T
    return back * share[..., None], (support * back).sum(-1) / weights.shape[0], d_projection


_fold_projection_op.register_autograd(_fold_backward, setup_context=_save_inputs)


@torch.library.custom_op("fssdeploy::hypercorrelation", mutates_args=())
def _hypercorrelation_op(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_hypercorrelation(query, support, weights)
    sizes = {"query": query.shape[1], "support": support.shape[1], "channels": query.shape[2]}
    return dispatch.run("hypercorrelation", query, sizes, lambda: _hypercorrelation(query, support, weights), None)


@_hypercorrelation_op.register_fake
def _(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    _check_hypercorrelation(query, support, weights)
    return query.new_empty((query.shape[0], query.shape[1], support.shape[1]))


def _check_hypercorrelation(query: torch.Tensor, support: torch.Tensor, weights: torch.Tensor) -> None:
    name = "hypercorrelation"
    contract.require_rank(name, query=(query, 3), support=(support, 3), weights=(weights, 1))
    contract.require_alike(name, query=query, support=support, weights=weights)
    contract.require_equal(name, "layers", query=query.shape[0], support=support.shape[0])
    contract.require_equal(name, "channels", query=query.shape[2], support=support.shape[2])
    contract.require_equal(name, "support cells", support=support.shape[1], weights=weights.shape[0])
    contract.require_some(name, layers=query.shape[0], cells=query.shape[1] * support.shape[1], channels=query.shape[2])


def _hypercorrelation_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _hypercorrelation_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, support, weights, output = ctx.saved_tensors
    masked = support * weights[:, None]
    (query_unit, query_length), (masked_unit, masked_length) = _unit(query), _unit(masked)
    gradient = gradient * (output > 0)
    d_query = _unit_backward(gradient @ masked_unit, query_unit, query_length)
    d_masked = _unit_backward(gradient.mT @ query_unit, masked_unit, masked_length)
    # Back to the dtype of the inputs at the end only: behind a small weight stands a gradient too large for float16.
    results = d_query, d_masked * weights[:, None], (d_masked * support).sum((0, 2))
    return tuple(result.to(query.dtype) for result in results)


def _unit_backward(gradient: torch.Tensor, unit: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Through `_unit`, wide: d/dx of x / (|x| + e) is (1 - u u^T (|x| + e) / |x|) / (|x| + e); 1 / e where x is 0."""
    wide, direction = gradient.to(length.dtype), unit.to(length.dtype)
    along = (wide * direction).sum(-1, keepdim=True) * ((length + EPSILON) / length.clamp_min(EPSILON**2))
    return (wide - direction * along) / (length + EPSILON)


_hypercorrelation_op.register_autograd(_hypercorrelation_backward, setup_context=_hypercorrelation_context)


@torch.library.custom_op("fssdeploy::correlation_projection", mutates_args=())
def _correlation_projection_op(query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    _check_projection(query, support, projection)
    _, supports, outputs = projection.shape
    return dispatch.run(
        "correlation_projection",
        query,
        {"query": len(query), "support": supports, "channels": query.shape[1], "outputs": outputs},
        reference=lambda: _projected(query, support, projection),
        kernel=lambda: _launch(query, support, projection),
    )


@_correlation_projection_op.register_fake
def _(query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    _check_projection(query, support, projection)
    return query.new_empty((support.shape[0], query.shape[0], projection.shape[2]))


def _check_projection(query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor) -> None:
    name = "correlation_projection"
    contract.require_rank(name, query=(query, 2), support=(support, 3), projection=(projection, 3))
    contract.require_alike(name, query=query, support=support, projection=projection)
    contract.require_equal(name, "channels", query=query.shape[1], support=support.shape[2])
    contract.require_equal(name, "shots", support=support.shape[0], projection=projection.shape[0])
    contract.require_equal(name, "support cells", support=support.shape[1], projection=projection.shape[1])
    contract.require_some(
        name, queries=query.shape[0], shots=support.shape[0], cells=support.shape[1], channels=query.shape[1],
        outputs=projection.shape[2],
    )  # fmt: skip


# Query rows that the backward pass recomputes at a time: it holds this many times Ns numbers of each shot.
BACKWARD_ROWS = 256


def _projection_gradients(
    gradient: torch.Tensor, query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, support and projection; the correlation is computed again, some query rows at a time."""
    wide = torch.promote_types(query.dtype, torch.float32)  # blocks are summed up in this
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_support, d_projection = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (support, projection))
    for first in range(0, len(query), BACKWARD_ROWS):
        rows = slice(first, first + BACKWARD_ROWS)
        correlation = (query[rows] @ support.mT).relu()
        d_correlation = (gradient[:, rows] @ projection.mT) * (correlation > 0)
        d_query[rows] = (d_correlation @ support).sum(0)
        d_support += d_correlation.mT @ query[rows]
        d_projection += correlation.mT @ gradient[:, rows]
    return d_query, d_support.to(support.dtype), d_projection.to(projection.dtype)


_projection_backward_op = torch.library.custom_op(
    "fssdeploy::correlation_projection_backward", _projection_gradients, mutates_args=()
)


@_projection_backward_op.register_fake
def _(
    gradient: torch.Tensor, query: torch.Tensor, support: torch.Tensor, projection: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), support.new_empty(support.shape), projection.new_empty(projection.shape)


def _projection_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.fssdeploy.correlation_projection_backward(gradient, *ctx.saved_tensors)


_correlation_projection_op.register_autograd(_projection_backward, setup_context=_save_inputs)


def shipped() -> tuple[ShippedKernel, ...]:
    """The fused projection in all its widths."""
    pointers = ("query", "support", "projection", "output")
    return tuple(
        ShippedKernel(
            name=f"correlation_projection_w{width}_{short}",
            function=_correlation_projection_kernel,
            signature={
                **dict.fromkeys(pointers, f"*{short}"),
                **dict.fromkeys(("shots", "queries", "supports", "channels", "outputs"), "i32"),
                **dict.fromkeys(_constants(dtype, width), "constexpr"),
            },
            constexprs=_constants(dtype, width),
            aligned=(*pointers, "channels", "outputs"),
            grid=("cdiv(queries, ROWS)", "cdiv(outputs, WIDTH)", "shots"),
            num_warps=WARPS,
            num_stages=STAGES,
        )
        for dtype, short in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for width in TILES[dtype.itemsize][2]
    )
