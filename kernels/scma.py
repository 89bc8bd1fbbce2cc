"""Support-calibrated memory attention (SCMA of FSSAM, equations (12) to (14)), with its pieces around it.

    A = scale * query keys^T                                     (B, N, S)
    norm = (A - low) / (high - low + 1e-7)                       over the calibrated keys, start .. start + Cn
    bias = strength * min(0, norm + calibration - 1)             there, 0 elsewhere; a constant for the gradient
    output = softmax(A + bias) values                            over all keys

`low` and `high` are the range of A over the calibrated keys: of each query (span "row", the released code) or of all
queries of the batch entry (span "global", the paper's text). Cn = 0 is plain attention. A range of zero gives norm 0.

Tensors are float16, bfloat16, float32 or float64, all of one dtype; calibration may be float32 instead. They are
finite, of any stride, and made contiguous where a kernel needs it. Log-sum-exp and range are float32 (float64 for
float64); the backward pass computes the weights again from them. Differentiable: query, keys and values, once.
No channels are too many for the reference and for "rows"; "flash" takes up to 256, in 16 bits.

Two kernel forms. "rows": matrix product, one kernel for range, bias and softmax of a row, matrix product; its logits
have the dtype of the tensors. "flash" (scma_flash): no queries x keys in memory, logits in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fssdeploy.kernels import contract, dispatch, onnx_node, runtime, scma_flash
from fssdeploy.kernels.runtime import UnsupportedError, jit, tl
from fssdeploy.kernels.shipped_kernel import ShippedKernel

SPANS = ("row", "global")
FORMS = ("auto", "rows", "flash")
RANGE_EPS = 1e-7
AREA_EPS = 5e-4
# Logits of 16 bits up to here stay in the cache of a large GPU between the three steps of "rows".
ROWS_BYTES = 32 * 2**20
# Keys that one program of the row kernel holds, and the warps it takes for them.
ROW_WARPS = {4096: 8, 8192: 16}
ROW_STAGES = 1
# Rows of logits start at multiples of so many elements, for 16-byte copies.
ROW_ALIGNMENT = 16

Attended = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float,
    span: str,
    scale: float,
) -> Attended:
    """Output (B, N, V), log-sum-exp, low and high (B, N) in plain PyTorch; autograd takes the bias for a constant."""
    logits = _logits(query, keys, scale)
    count = calibration.shape[1]
    if count == 0:
        low = high = logits.new_zeros(logits.shape[:2])
    else:
        axes = (1, 2) if span == "global" else (2,)
        calibrated = logits.detach()[:, :, start : start + count]
        low = calibrated.amin(axes, keepdim=True).expand(-1, logits.shape[1], 1)[:, :, 0].contiguous()
        high = calibrated.amax(axes, keepdim=True).expand(-1, logits.shape[1], 1)[:, :, 0].contiguous()
    logits = logits + _bias(logits, low, high, calibration, start, strength)
    lse = logits.logsumexp(2)
    weights = (logits - lse[:, :, None]).exp()
    return weights.to(values.dtype) @ values, lse, low, high.clone()


def reference_gradients(
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
) -> Gradients:
    """Gradients of query, keys and values from that of the output, with the weights computed again."""
    logits = _logits(query, keys, scale)
    logits = logits + _bias(logits, low, high, calibration, start, strength)
    weights = (logits - lse[:, :, None]).exp()
    delta = (gradient.to(lse.dtype) * output).sum(2, keepdim=True)
    slopes = (weights * ((gradient @ values.mT).to(lse.dtype) - delta) * scale).to(query.dtype)
    return slopes @ keys, slopes.mT @ query, weights.to(values.dtype).mT @ gradient


def _logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    logits = (query * scale) @ keys.mT
    return logits if logits.dtype == torch.float64 else logits.float()


def _bias(
    logits: torch.Tensor, low: torch.Tensor, high: torch.Tensor, calibration: torch.Tensor, start: int, strength: float
) -> torch.Tensor:
    """The bias of all keys, (B, N, S), without a gradient."""
    calibrated = logits.detach()[:, :, start : start + calibration.shape[1]]
    norm = (calibrated - low[:, :, None]) / (high - low + RANGE_EPS)[:, :, None]
    bias = strength * (norm + calibration[:, None].to(norm.dtype).detach() - 1).clamp(max=0)
    return torch.nn.functional.pad(bias, (start, logits.shape[2] - start - calibration.shape[1]))


@jit
def row_kernel(  # type: ignore[no-untyped-def]
    logits, calibration, lse, low, high, batches, query_count, key_count, stride, start, count, strength,
    GIVEN_RANGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Logits of one query to weights, in place, zeros up to `stride`; low and high are read with GIVEN_RANGE."""
    batch = tl.program_id(0) % batches
    row = batch * query_count + tl.program_id(0) // batches
    key = tl.arange(0, KEYS)
    # The mask ends at the stride, a multiple of 16, and not at the last key: it would make the copies 2 bytes wide.
    stored = tl.load(logits + row * stride + key, mask=key < stride, other=0.0).to(tl.float32)
    attended = tl.where(key < key_count, stored, float("-inf"))
    place = key - start
    inside = (place >= 0) & (place < count)
    if GIVEN_RANGE:
        least = tl.load(low + row)
        greatest = tl.load(high + row)
    else:
        least = tl.where(count > 0, tl.min(tl.where(inside, attended, float("inf")), 0), 0.0)
        greatest = tl.where(count > 0, tl.max(tl.where(inside, attended, float("-inf")), 0), 0.0)
        tl.store(low + row, least)
        tl.store(high + row, greatest)
    confidence = tl.load(calibration + batch * count + place, mask=inside, other=0.0)
    bias = strength * tl.minimum((attended - least) / (greatest - least + 1e-7) + confidence - 1.0, 0.0)
    attended = tl.where(inside, attended + bias, attended)
    peak = tl.max(attended, 0)
    weights = tl.exp(attended - peak)
    total = tl.sum(weights, 0)
    tl.store(lse + row, peak + tl.log(total))
    tl.store(logits + row * stride + key, (weights / total).to(logits.dtype.element_ty), mask=key < stride)


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float,
    span: str,
    scale: float,
) -> Attended:
    """What `reference_attention` returns, by two matrix products around the row kernel.

    UnsupportedError for float64 and for more keys than a program holds.
    """
    batches, query_count, key_count = query.shape[0], query.shape[1], keys.shape[1]
    if query.dtype == torch.float64:
        raise UnsupportedError("kernels do not compute in float64")
    held = next((each for each in ROW_WARPS if each >= key_count), None)
    if held is None:
        raise UnsupportedError(f"the row kernel holds {max(ROW_WARPS)} keys, there are {key_count}")
    stride = -(-key_count // ROW_ALIGNMENT) * ROW_ALIGNMENT
    padded = torch.empty((batches, query_count, stride), dtype=query.dtype, device=query.device)
    runtime.require_int32(logits=padded.numel())
    logits = padded[:, :, :key_count]
    torch.baddbmm(logits, query, keys.mT, beta=0, alpha=scale, out=logits)
    calibration = calibration.float().contiguous()
    lse, low, high = (query.new_empty((batches, query_count), dtype=torch.float32) for _ in range(3))
    given = span == "global" and calibration.shape[1] > 0
    if given:
        calibrated = logits[:, :, start : start + calibration.shape[1]]
        low.copy_(calibrated.amin((1, 2))[:, None])
        high.copy_(calibrated.amax((1, 2))[:, None])
    row_kernel[(batches * query_count,)](
        padded, calibration, lse, low, high,
        batches, query_count, key_count, stride, start, calibration.shape[1], strength,
        GIVEN_RANGE=given, KEYS=held, num_warps=ROW_WARPS[held], num_stages=ROW_STAGES,
    )  # fmt: skip
    return logits @ values, lse, low, high


@torch.library.custom_op("fssdeploy::calibrated_attention", mutates_args=())
def _operation(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float,
    span: str,
    scale: float,
    form: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(query, keys, values, calibration, strength, span, form)
    # Not part of _check: comparing sizes that vary would bound them in an export.
    if start < 0 or start + calibration.shape[1] > keys.shape[1]:
        found = f"they begin at {start}, are {calibration.shape[1]} in number, and there are {keys.shape[1]} keys"
        contract.refuse("calibrated_attention", "the calibrated keys lie outside the keys", found)
    arguments = (query, keys, values, calibration, start, strength, span, scale)
    small = 2 * query.shape[0] * query.shape[1] * keys.shape[1] <= ROWS_BYTES and keys.shape[1] <= max(ROW_WARPS)
    rows = form == "rows" or (form == "auto" and small)
    return dispatch.run(
        "calibrated_attention_rows" if rows else "calibrated_attention",
        query,
        _sizes(query, keys, values),
        reference=lambda: reference_attention(*arguments),
        kernel=lambda: attend_rows(*arguments) if rows else scma_flash.forward(*arguments),
    )


@_operation.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float,
    span: str,
    scale: float,
    form: str,
) -> Attended:
    _check(query, keys, values, calibration, strength, span, form)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse, low, high = (query.new_empty(query.shape[:2], dtype=dtype) for _ in range(3))
    return query.new_empty((*query.shape[:2], values.shape[2])), lse, low, high


@torch.library.custom_op("fssdeploy::calibrated_attention_backward", mutates_args=())
def _backward_operation(
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
    tensors = (gradient, output, lse, low, high, query, keys, values, calibration)
    return dispatch.run(
        "calibrated_attention_backward",
        query,
        _sizes(query, keys, values),
        reference=lambda: reference_gradients(*tensors, start, strength, scale),
        kernel=lambda: scma_flash.backward(*tensors, start, strength, scale),
    )


@_backward_operation.register_fake
def _(
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
) -> Gradients:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Attended) -> None:
    query, keys, values, calibration, start, strength, _, scale, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, query, keys, values, calibration)
    ctx.numbers = (start, strength, scale)


def _gradients(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = _backward_operation(gradient, *ctx.saved_tensors, *ctx.numbers)
    return *found, None, None, None, None, None, None


_operation.register_autograd(_gradients, setup_context=_keep)


def calibrated_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    start: int,
    strength: float = 10.0,
    span: str = "row",
    scale: float | None = None,
    form: str = "auto",
) -> torch.Tensor:
    """Attention of `query` (B, N, D) to `keys` (B, S, D) with calibrated logits: mean of `values` (B, S, V), (B, N, V).

    `calibration` (B, Cn) in [0, 1] belongs to the keys start .. start + Cn; 1 leaves a logit as it is. `strength` is
    alpha, at least 0. `span` "row" normalises the logits of each query, "global" those of a batch entry together.
    `scale` is D**-0.5 unless given. The calibration gets no gradient. `form` chooses the kernel where one runs:
    "auto" takes "rows" for logits of 16 bits up to ROWS_BYTES that need no gradient, else "flash".
    FSSAM, equations (12) to (14) and the released code. InputError (kernel_input) for shapes, dtypes or names that do
    not fit.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if onnx_node.tracing():
        _check(query, keys, values, calibration, strength, span, form)
        attributes = {"start": start, "strength": strength, "span": span, "scale": scale}
        shape = (query.shape[0], query.shape[1], values.shape[2])
        inputs = (query, keys, values, calibration)
        return onnx_node.node("CalibratedAttention", inputs, attributes, [(query.dtype, shape)])[0]
    wants_gradient = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)
    form = "flash" if form == "auto" and wants_gradient else form
    return _operation(query, keys, values, calibration.detach(), start, strength, span, scale, form)[0]


def shot_calibration(support_keys: torch.Tensor, masks: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How much each of `keys` (Cn, D) resembles the targets of k supports: (Cn,) in [0, 1], float32 at least.

    Per shot the mean of `support_keys` (k, M, D) under `masks` (k, M) is compared with the keys by its cosine, the
    cosines are stretched over [0, 1], and then averaged over the shots. An empty mask gives 0. FSSAM, equation (12),
    in the order of the released code. InputError (kernel_input) for shapes that do not fit.
    """
    name = "shot_calibration"
    contract.require_rank(name, support_keys=(support_keys, 3), masks=(masks, 2), keys=(keys, 2))
    contract.require_alike(name, support_keys=support_keys, keys=keys)
    contract.require_equal(name, "channels", support_keys=support_keys.shape[2], keys=keys.shape[1])
    contract.require_equal(name, "shots", support_keys=support_keys.shape[0], masks=masks.shape[0])
    contract.require_equal(name, "positions", support_keys=support_keys.shape[1], masks=masks.shape[1])
    contract.require_some(name, shots=masks.shape[0], keys=keys.shape[0])
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    support_keys, masks, keys = support_keys.to(dtype), masks.to(dtype), keys.to(dtype)
    prototypes = (masks[:, None] @ support_keys)[:, 0] / (masks.sum(1, keepdim=True) + AREA_EPS)
    lengths = prototypes.norm(dim=1, keepdim=True) * keys.norm(dim=1)
    cosines = prototypes @ keys.mT / (lengths + RANGE_EPS)
    low, high = cosines.amin(1, keepdim=True), cosines.amax(1, keepdim=True)
    return ((cosines - low) / (high - low + RANGE_EPS)).mean(0)


def project_values(attended: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The value projection `weight` (O, V), `bias` (O,) after the attention: `attended` (..., V) to (..., O).

    The weights of a query sum to 1, so this equals attention to projected values, with O / V times less work in it.
    Not so with dropout on the weights. InputError (kernel_input) for widths that differ.
    """
    contract.require_rank("project_values", weight=(weight, 2))
    contract.require_equal("project_values", "channels", attended=attended.shape[-1], weight=weight.shape[1])
    return torch.nn.functional.linear(attended, weight, bias)


def shipped() -> tuple[ShippedKernel, ...]:
    """The row kernel at both of its sizes and the kernels of "flash", in 16 bits."""
    kernels = []
    for dtype in ("fp16", "bf16", "fp32"):
        for held, warps in ROW_WARPS.items():
            for given in (False, True):
                constants = {"GIVEN_RANGE": given, "KEYS": held}
                types = scma_flash.signature(row_kernel, dtype, constants)
                kernels.append(
                    ShippedKernel(
                        name=f"calibrated_attention_{'global' if given else 'row'}_{dtype}_k{held}",
                        function=row_kernel,
                        signature=types,
                        constexprs=constants,
                        aligned=("stride", *(each for each, kind in types.items() if kind.startswith("*"))),
                        grid=("batches * query_count", "1", "1"),
                        num_warps=warps,
                        num_stages=ROW_STAGES,
                        matrix=False,
                        copies=0,
                    )
                )
    return *kernels, *scma_flash.shipped()


def _sizes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
    batch, queries, channels = query.shape
    return {
        "batch": batch,
        "query": queries,
        "keys": keys.shape[1],
        "channels": channels,
        "values": values.shape[2],
    }


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    calibration: torch.Tensor,
    strength: float,
    span: str,
    form: str,
) -> None:
    name = "calibrated_attention"
    contract.require_rank(name, query=(query, 3), keys=(keys, 3), values=(values, 3), calibration=(calibration, 2))
    contract.require_alike(name, query=query, keys=keys, values=values)
    converted = calibration.to(query.dtype) if calibration.dtype == torch.float32 else calibration
    contract.require_alike(name, query=query, calibration=converted)
    batches = {"query": query, "keys": keys, "values": values, "calibration": calibration}
    contract.require_equal(name, "batch entries", **{each: tensor.shape[0] for each, tensor in batches.items()})
    contract.require_equal(name, "channels", query=query.shape[2], keys=keys.shape[2])
    contract.require_equal(name, "keys", keys=keys.shape[1], values=values.shape[1])
    contract.require_some(name, queries=query.shape[1], keys=keys.shape[1], channels=query.shape[2])
    if not (math.isfinite(strength) and strength >= 0):
        contract.refuse(name, f"strength is {strength}", "it is finite and at least 0")
    for what, value, choices in (("span", span, SPANS), ("form", form, FORMS)):
        if value not in choices:
            contract.refuse(name, f"{what} is {value!r}", f"it is one of {', '.join(choices)}")
