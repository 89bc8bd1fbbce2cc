"""Calibrated attention as an operation of PyTorch on the CPU: the mathematics, gradients, what the compilers see."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from fssdeploy.errors import InputError
from fssdeploy.kernels import dispatch, onnx_node, scma, scma_flash
from tests.conftest import golden_cases, read_case

# One layer of attention is enough; cases that recorded less than that say nothing here.
RECORDED = [
    folder for folder in golden_cases("fssam") if "layer0_q" in {s["name"] for s in read_case(folder)["stages"]}
]


def tensors(
    batch: int = 2, queries: int = 7, keys: int = 11, calibrated: int = 5, dtype: torch.dtype = torch.float64
) -> scma.Attended:
    """query (B, N, 6), keys (B, S, 6), values (B, S, 4), calibration (B, Cn)."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((batch, queries, 6), (batch, keys, 6), (batch, keys, 4))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    calibration = torch.rand((batch, calibrated), generator=generator, dtype=torch.float64).to(dtype)
    return query, key, value, calibration


def by_definition(
    tensors: scma.Attended,
    start: int,
    strength: float,
    span: str,
    detached: bool = True,
) -> torch.Tensor:
    """The formulas key by key: the released code row by row, the paper's normalisation over the whole block."""
    query, keys, values, calibration = tensors
    outputs = []
    for b in range(len(query)):
        logits = query[b] @ keys[b].T / math.sqrt(query.shape[2])
        source = logits.detach() if detached else logits
        block = source[:, start : start + calibration.shape[1]]
        rows = []
        for i in range(len(logits)):
            within = block[i] if span == "row" else block
            row = list(logits[i])
            for j in range(calibration.shape[1]):
                norm = (block[i, j] - within.min()) / (within.max() - within.min() + 1e-7)
                row[start + j] = row[start + j] + strength * (norm + calibration[b, j] - 1).clamp(max=0)
            rows.append(torch.stack(row))
        outputs.append(torch.stack(rows).softmax(1) @ values[b])
    return torch.stack(outputs)


SHAPES = [(2, 7, 11, 5, 3), (1, 13, 17, 17, 0), (3, 1, 5, 1, 4), (1, 6, 4, 2, 2)]


@pytest.mark.parametrize("span", scma.SPANS)
@pytest.mark.parametrize(("batch", "queries", "keys", "calibrated", "start"), SHAPES)
def test_it_is_the_formula(batch: int, queries: int, keys: int, calibrated: int, start: int, span: str) -> None:
    drawn = tensors(batch, queries, keys, calibrated)
    expected = by_definition(drawn, start, 10.0, span)
    torch.testing.assert_close(scma.calibrated_attention(*drawn, start, span=span), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2), ("float32", 1e-5)])
def test_it_computes_in_every_dtype(dtype: str, tolerance: float) -> None:
    drawn = tensors(dtype=getattr(torch, dtype))
    query, keys, values, calibration = (tensor.double() for tensor in drawn)
    expected = by_definition((query, keys, values, calibration), 3, 10.0, "row")
    found = scma.calibrated_attention(*drawn, 3)
    assert found.dtype == drawn[0].dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_the_calibration_may_be_float32_beside_16_bits() -> None:
    query, keys, values, calibration = tensors(dtype=torch.float16)
    found = scma.calibrated_attention(query, keys, values, calibration.float(), 3)
    torch.testing.assert_close(found, scma.calibrated_attention(query, keys, values, calibration, 3))


@pytest.mark.parametrize("span", scma.SPANS)
def test_full_confidence_and_no_calibrated_keys_are_plain_attention(span: str) -> None:
    query, keys, values, calibration = tensors()
    plain = functional.scaled_dot_product_attention(query, keys, values)
    for confidence in (torch.ones_like(calibration), calibration[:, :0]):
        torch.testing.assert_close(scma.calibrated_attention(query, keys, values, confidence, 3, span=span), plain)
    assert (scma.calibrated_attention(query, keys, values, calibration, 3, span=span) - plain).abs().max() > 0.01


def test_the_span_decides_whether_queries_know_of_each_other() -> None:
    query, keys, values, calibration = tensors()
    order = torch.randperm(query.shape[1], generator=torch.Generator().manual_seed(0))
    for span in scma.SPANS:
        whole = scma.calibrated_attention(query, keys, values, calibration, 3, span=span)
        permuted = scma.calibrated_attention(query[:, order], keys, values, calibration, 3, span=span)
        torch.testing.assert_close(permuted, whole[:, order])
        alone = scma.calibrated_attention(query[:, :2], keys, values, calibration, 3, span=span)
        assert torch.allclose(alone, whole[:, :2]) == (span == "row")


@pytest.mark.parametrize("span", scma.SPANS)
def test_only_calibrated_logits_change_and_only_down_to_the_strength(span: str) -> None:
    query, keys, _, calibration = tensors()
    every_key = torch.eye(keys.shape[1], dtype=keys.dtype).expand(len(keys), -1, -1)
    logits = query @ keys.mT / math.sqrt(6)
    attended = scma.calibrated_attention(query, keys, every_key, 0.3 * calibration, 3, strength=4.0, span=span).log()
    bias = attended - logits
    bias = bias - bias[:, :, :1]  # the first key is not calibrated; rows of logarithms differ by a constant
    outside = torch.cat([bias[:, :, :3], bias[:, :, 8:]], 2)
    torch.testing.assert_close(outside, torch.zeros_like(outside))
    assert bias.min() >= -4 - 1e-9
    assert bias.max() <= 1e-9
    assert bias[:, :, 3:8].min() < -2


def test_a_range_of_zero_leaves_the_full_bias() -> None:
    query, keys, _, calibration = tensors()
    keys[:, 3:8] = keys[:, 3:4]
    every_key = torch.eye(keys.shape[1], dtype=keys.dtype).expand(len(keys), -1, -1)
    attended = scma.calibrated_attention(query, keys, every_key, calibration, 3).log()
    bias = attended - query @ keys.mT / math.sqrt(6)
    expected = 10 * (calibration - 1)
    torch.testing.assert_close((bias[:, :, 3:8] - bias[:, :, :1]), expected[:, None].expand(-1, query.shape[1], -1))


def gradients(outputs: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    return torch.autograd.grad((outputs * weights).sum(), inputs)


@pytest.mark.parametrize("span", scma.SPANS)
def test_gradients_treat_the_bias_as_a_constant(span: str) -> None:
    query, keys, values, calibration = tensors()
    inputs = (query.requires_grad_(), keys.requires_grad_(), values.requires_grad_())
    found = gradients(scma.calibrated_attention(*inputs, calibration, 3, span=span), inputs)
    expected = gradients(by_definition((*inputs, calibration), 3, 10.0, span), inputs)
    through = gradients(by_definition((*inputs, calibration), 3, 10.0, span, detached=False), inputs)
    for mine, right, wrong in zip(found[:2], expected, through, strict=False):
        torch.testing.assert_close(mine, right)
        assert (mine - wrong).abs().max() > 0.05 * right.abs().max()
    torch.testing.assert_close(found[2], expected[2])


def test_no_gradient_reaches_the_calibration() -> None:
    query, keys, values, calibration = tensors()
    found = scma.calibrated_attention(query.requires_grad_(), keys, values, calibration.requires_grad_(), 3)
    found.sum().backward()
    assert calibration.grad is None
    assert query.grad is not None


@pytest.mark.parametrize("calibrated", [5, 0])
def test_gradcheck_where_the_bias_is_constant(calibrated: int) -> None:
    query, keys, values, calibration = tensors(2, 3, 6, calibrated)
    inputs = (query.requires_grad_(), keys.requires_grad_(), values.requires_grad_())
    confidence = torch.ones_like(calibration)
    assert torch.autograd.gradcheck(lambda q, k, v: scma.calibrated_attention(q, k, v, confidence, 1), inputs)


def test_opcheck() -> None:
    query, keys, values, calibration = tensors(1, 3, 5, 2)
    inputs = (query.requires_grad_(), keys.requires_grad_(), values.requires_grad_())
    numbers = (3, 10.0, "row", 0.4, "auto")
    torch.library.opcheck(torch.ops.fssdeploy.calibrated_attention, (*inputs, calibration, *numbers))
    with torch.no_grad():
        attended = torch.ops.fssdeploy.calibrated_attention(*inputs, calibration, *numbers)
        saved = (torch.ones_like(attended[0]), *attended, *(each.detach() for each in inputs), calibration)
    torch.library.opcheck(torch.ops.fssdeploy.calibrated_attention_backward, (*saved, 3, 10.0, 0.4))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("calibrated", [0, 5])
def test_the_fake_outputs_are_like_the_real_ones(dtype: str, calibrated: int) -> None:
    drawn = tensors(calibrated=calibrated, dtype=getattr(torch, dtype))
    arguments = (*drawn, 3, 10.0, "global", 0.4, "auto")
    checks = ("test_schema", "test_faketensor")  # the first also refuses outputs that share memory
    torch.library.opcheck(torch.ops.fssdeploy.calibrated_attention, arguments, test_utils=checks)


class Layer(torch.nn.Module):
    def forward(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return scma.calibrated_attention(query, keys, values, c, 3) * 2


def test_export_with_sizes_that_vary() -> None:
    batch, queries, keys, calibrated = (torch.export.Dim(name, min=2, max=4096) for name in "bnsc")
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys}, {0: batch, 1: calibrated})
    program = torch.export.export(Layer(), tuple(tensors()), dynamic_shapes=shapes)
    calls = [node for node in program.graph.nodes if node.target == torch.ops.fssdeploy.calibrated_attention.default]
    assert len(calls) == 1
    others = tensors(3, 9, 23, 6)
    torch.testing.assert_close(program.module()(*others), Layer()(*others))


def test_compile_forward_and_backward() -> None:
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    query, keys, values, calibration = tensors()
    inputs = (query.requires_grad_(), keys.requires_grad_(), values.requires_grad_())
    found = compiled(*inputs, calibration)
    expected = Layer()(*inputs, calibration)
    torch.testing.assert_close(found, expected)
    for mine, right in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, right)


def test_an_export_to_onnx_sees_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def node(name: str, inputs: Any, attributes: Any, outputs: Any) -> tuple[torch.Tensor]:
        seen.append((name, len(inputs), attributes, outputs))
        return (torch.zeros(outputs[0][1]),)

    monkeypatch.setattr(onnx_node, "tracing", lambda: True)
    monkeypatch.setattr(onnx_node, "node", node)
    assert scma.calibrated_attention(*tensors(), 3, span="global").shape == (2, 7, 4)
    attributes = {"start": 3, "strength": 10.0, "span": "global", "scale": 6**-0.5}
    assert seen == [("CalibratedAttention", 4, attributes, [(torch.float64, (2, 7, 4))])]


def test_the_dispatcher_hears_of_the_form_that_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(operation: str, like: Any, sizes: Any, reference: Any, kernel: Any) -> Any:
        asked.append(operation)
        return reference()

    monkeypatch.setattr(dispatch, "run", run)
    query, keys, values, calibration = tensors()
    scma.calibrated_attention(query, keys, values, calibration, 3)
    scma.calibrated_attention(query, keys, values, calibration, 3, form="flash")
    scma.calibrated_attention(query.requires_grad_(), keys, values, calibration, 3).sum().backward()
    with torch.no_grad():
        scma.calibrated_attention(query, keys, values, calibration, 3)
    monkeypatch.setattr(scma, "ROWS_BYTES", 2 * 2 * 7 * 11 - 1)
    scma.calibrated_attention(query.detach(), keys, values, calibration, 3)
    flash, rows = "calibrated_attention", "calibrated_attention_rows"
    assert asked == [rows, flash, flash, "calibrated_attention_backward", rows, flash]


BAD = [
    ({"query": torch.zeros(7, 6)}, "dimensions"),
    ({"query": torch.zeros(2, 7, 5)}, "channels"),
    ({"values": torch.zeros(2, 10, 4)}, "keys"),
    ({"values": torch.zeros(2, 11, 4, dtype=torch.float16)}, "dtypes"),
    ({"calibration": torch.zeros(2, 5, dtype=torch.int64)}, "dtypes"),
    ({"calibration": torch.zeros(1, 5)}, "batch entries"),
    ({"calibration": torch.zeros(2, 9)}, "outside"),
    ({"query": torch.zeros(2, 0, 6)}, "no queries"),
    ({"start": -1}, "outside"),
    ({"strength": -1.0}, "strength"),
    ({"strength": math.inf}, "strength"),
    ({"span": "column"}, "row, global"),
    ({"form": "fast"}, "auto, rows, flash"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("query", "keys", "values", "calibration")
    arguments = {**dict(zip(names, tensors(dtype=torch.float32), strict=True)), "start": 3, **change}
    with pytest.raises(InputError, match=message) as caught:
        scma.calibrated_attention(**arguments)
    assert caught.value.code == "kernel_input"


def test_shots_are_normalised_before_they_are_averaged() -> None:
    generator = torch.Generator().manual_seed(2)
    support, keys = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 9, 6), (5, 6)))
    masks = (torch.rand((3, 9), generator=generator) > 0.5).double()
    expected = torch.zeros(5, dtype=torch.float64)
    for shot in range(3):
        prototype = sum(masks[shot, i] * support[shot, i] for i in range(9)) / (masks[shot].sum() + 5e-4)
        cosines = torch.stack([prototype @ key / (prototype.norm() * key.norm() + 1e-7) for key in keys])
        expected += (cosines - cosines.min()) / (cosines.max() - cosines.min() + 1e-7) / 3
    torch.testing.assert_close(scma.shot_calibration(support, masks, keys), expected)


def test_identical_shots_are_one_shot() -> None:
    generator = torch.Generator().manual_seed(3)
    support, keys = (torch.randn(shape, generator=generator) for shape in ((1, 9, 6), (5, 6)))
    masks = torch.rand((1, 9), generator=generator)
    one = scma.shot_calibration(support, masks, keys)
    torch.testing.assert_close(scma.shot_calibration(support.repeat(5, 1, 1), masks.repeat(5, 1), keys), one)
    assert one.min() == 0
    assert one.max() > 0.999


def test_an_empty_mask_trusts_no_key() -> None:
    support, keys = torch.randn(1, 9, 6), torch.randn(5, 6)
    assert not scma.shot_calibration(support, torch.zeros(1, 9), keys).any()
    half = scma.shot_calibration(support.half(), torch.ones(1, 9, dtype=torch.bool), keys.half())
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((9, 6), (1, 9), (5, 6)), "dimensions"),
        (((1, 9, 6), (1, 9), (5, 7)), "channels"),
        (((1, 9, 6), (2, 9), (5, 6)), "shots"),
        (((1, 9, 6), (1, 8), (5, 6)), "positions"),
        (((1, 9, 6), (1, 9), (0, 6)), "no keys"),
    ],
)
def test_shots_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scma.shot_calibration(*(torch.zeros(shape) for shape in shapes))


def test_values_projected_after_the_attention() -> None:
    query, keys, values, calibration = tensors()
    generator = torch.Generator().manual_seed(4)
    weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 4), (9,)))
    before = scma.calibrated_attention(query, keys, values @ weight.T + bias, calibration, 3)
    after = scma.project_values(scma.calibrated_attention(query, keys, values, calibration, 3), weight, bias)
    torch.testing.assert_close(after, before)
    with pytest.raises(InputError, match="channels"):
        scma.project_values(values, weight.T)


def test_shipped_kernels_are_those_that_are_launched() -> None:
    shipped = scma.shipped()
    assert len({kernel.name for kernel in shipped}) == len(shipped)
    for kernel in shipped:
        assert kernel.constexprs.keys() == {name for name, kind in kernel.signature.items() if kind == "constexpr"}
        assert {name for name, kind in kernel.signature.items() if kind.startswith("*")} <= set(kernel.aligned)
        for formula in kernel.grid:
            names = set(formula.replace("cdiv(", " ").replace(")", " ").replace(",", " ").replace("*", " ").split())
            assert names - {"1"} <= set(kernel.signature)
    functions = {kernel.function for kernel in shipped}
    assert functions >= {scma.row_kernel, scma_flash.range_kernel, scma_flash.forward_kernel, scma_flash.merge_kernel}
    assert functions >= {scma_flash.key_gradients_kernel, scma_flash.query_gradients_kernel}


def test_there_is_a_recorded_layer() -> None:
    assert RECORDED


@pytest.mark.golden
@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: f"fssam-{folder.name}")
def test_one_layer_is_as_recorded(folder: Path) -> None:
    case = read_case(folder)
    stages, weights, inputs = (load_file(folder / case["files"][name]) for name in ("stages", "weights", "inputs"))
    tolerances = {stage["name"]: {k: stage["compare"][k] for k in ("rtol", "atol")} for stage in case["stages"]}
    query, keys, values = (stages[f"layer0_{name}"][:, 0] for name in "qkv")
    queries = query.shape[1]  # also the number of support positions: memories lie on the grid of the queries
    side = math.isqrt(queries)
    masks = functional.interpolate((inputs["support_label"] == 1).float(), (side, side)).flatten(2)
    calibrated = slice(queries, 2 * queries)
    calibration = torch.stack(
        [scma.shot_calibration(keys[b : b + 1, :queries], masks[b], keys[b, calibrated]) for b in range(len(query))]
    )
    recorded = stages["layer0_cos_norm"][:, 0, 0]
    torch.testing.assert_close(calibration, recorded, **tolerances["layer0_cos_norm"])

    # Weights of every key, in float64 so that their logarithms exist.
    every_key = torch.eye(keys.shape[1]).double().expand(len(keys), -1, -1)
    weights_of_keys = scma.calibrated_attention(query.double(), keys.double(), every_key, calibration.double(), queries)
    bias = weights_of_keys.log() - stages["layer0_scores"][:, 0].double()
    bias = (bias - bias[:, :, :1])[:, :, calibrated]
    atol = 2 * tolerances["layer0_scores"]["atol"]  # of the key itself and of the first
    torch.testing.assert_close(bias, stages["layer0_bias"][:, 0].double(), rtol=1e-4, atol=atol)

    def linear(name: str, tokens: torch.Tensor) -> torch.Tensor:
        return functional.linear(tokens, *parameters(name))

    def norm(name: str, tokens: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(tokens, tokens.shape[-1:], *parameters(name))

    def parameters(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = f"sam2.memory_attention.layers.0.{name}"
        return weights[f"{prefix}.weight"].float(), weights[f"{prefix}.bias"].float()

    attended = scma.calibrated_attention(query, keys, values, calibration, queries)
    tokens = stages["layer0_after_self"] + linear("cross_attn_image.out_proj", attended)
    tokens = tokens + linear("linear2", linear("linear1", norm("norm3", tokens)).relu())
    torch.testing.assert_close(tokens, stages["layer0_out"], **tolerances["layer0_out"])
