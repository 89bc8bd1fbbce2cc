"""Every lint rule on a graph that breaks it alone and on one that does not; then the real exported stages."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.export.artifact import one_row
from fssdeploy.export.lint import LARGE_TENSOR, RULES, Finding, lint
from fssdeploy.export.onnx import StageFiles, export_stage
from fssdeploy.protocol import StageSpec, TensorSpec
from fssdeploy.systems import fsdino

ONNXRUNTIME = frozenset({"com.microsoft"})


def model(graph: str, opset: int = 18, domains: str = "", functions: str = "") -> onnx.ModelProto:
    """A model from ONNX's text form."""
    return parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n{graph}\n{functions}')


def spec_of(graph: onnx.ModelProto) -> StageSpec:
    """The spec that a graph keeps, so that no rule on inputs and outputs trips by accident."""

    def tensors(values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    return StageSpec("stage", tensors(list(graph.graph.input)), tensors(list(graph.graph.output)))


X = spec_of(model("g (float[batch,4] x) => (float[batch,4] y) { y = Relu(x) }"))


@dataclass(frozen=True)
class Case:
    """One rule, a graph that breaks it and no other, and one that keeps all; `spec` belongs to the bad graph."""

    rule: str
    severity: str
    bad: onnx.ModelProto
    good: onnx.ModelProto
    spec: StageSpec | None = None


def unary(node: str, extra: str = "", opset: int = 18) -> onnx.ModelProto:
    """float x (batch, 4) to float y (batch, 4) through one line of ONNX text."""
    return model(f"g (float[batch,4] x) => (float[batch,4] y) {extra} {{ {node} }}", opset)


def resize(attributes: str) -> onnx.ModelProto:
    sizes = "<int64[4] sizes = {1, 1, 8, 8}>"
    return model(f"g (float[1,1,4,4] x) => (float[1,1,8,8] y) {sizes} {{ y = Resize <{attributes}> (x, , , sizes) }}")


def written_out_norm(kind: str) -> onnx.ModelProto:
    return model(
        f"""g ({kind}[batch,4] x) => ({kind}[batch,4] y)
        <int64[1] axis = {{-1}}, {kind} two = {{2}}, {kind} eps = {{1}}> {{
            mean = ReduceMean(x, axis)  centred = Sub(x, mean)  squares = Pow(centred, two)
            variance = ReduceMean(squares, axis)  safe = Add(variance, eps)  std = Sqrt(safe)  y = Div(centred, std)
        }}"""
    )


def softmax(kind: str, columns: int) -> onnx.ModelProto:
    return model(f"g ({kind}[batch,{columns}] x) => ({kind}[batch,{columns}] y) {{ y = Softmax <axis = -1> (x) }}")


def with_metadata(key: str, value: str) -> onnx.ModelProto:
    graph = unary("y = Relu(x)")
    graph.graph.node[0].metadata_props.add(key=key, value=value)
    return graph


def with_external(location: str) -> onnx.ModelProto:
    graph = unary("y = Add(x, w)", "<float[4] w = {1, 2, 3, 4}>")
    weight = graph.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.ClearField("float_data")
    weight.external_data.add(key="location", value=location)
    return graph


ROWS = LARGE_TENSOR // 16 + 1  # of 4 floats: just above the limit for duplicates
SIZE = ROWS * 16


def twins(second_offset: int) -> onnx.ModelProto:
    """Two large initialisers in a weights file, the first at its start."""
    body = "u = MatMul(x, a) v = MatMul(x, b) y = Add(u, v)"
    graph = model(f"g (float[batch,{ROWS}] x) => (float[batch,4] y) {{ {body} }}")
    for name, offset in (("a", 0), ("b", second_offset)):
        tensor = graph.graph.initializer.add(name=name, dims=[ROWS, 4], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.data"), ("offset", offset), ("length", SIZE)):
            tensor.external_data.add(key=key, value=str(value))
    return graph


CASES = [
    Case(
        "io-names",
        "error",
        model("g (float[batch,4] x) => (float[batch,4] layer_norm_24) { layer_norm_24 = Relu(x) }"),
        unary("y = Relu(x)"),
        X,
    ),
    Case(
        "io-dtype",
        "error",
        model("g (float16[batch,4] x) => (float[batch,4] y) { y = Cast <to = 1> (x) }"),
        unary("y = Relu(x)"),
        X,
    ),
    Case(
        "io-shape",
        "error",
        model("g (float[batch,5] x) => (float[batch,5] y) { y = Relu(x) }"),
        unary("y = Relu(x)"),
        X,
    ),
    Case(
        "int64-io",
        "error",
        model("g (float[8,4] x, int64[3] i) => (float[3,4] y) { y = Gather(x, i) }"),
        model("g (float[8,4] x, int32[3] i) => (float[3,4] y) { y = Gather(x, i) }"),
    ),
    Case(
        "dynamic-dim",
        "error",
        model("g (float[batch,n,4] x) => (float[batch,n,4] y) { y = Relu(x) }"),
        model("g (float[batch,9,4] x) => (float[batch,9,4] y) { y = Relu(x) }"),
        spec_of(model("g (float[batch,9,4] x) => (float[batch,9,4] y) { y = Relu(x) }")),
    ),
    Case(
        "symbolic-size",
        "error",
        model("g (float[batch,1,h,w] x) => (float[batch,1,h,w] y) { y = Relu(x) }"),
        model("g (float[batch,1,4,4] x) => (float[batch,1,4,4] y) { y = Relu(x) }"),
        spec_of(model("g (float[batch,1,4,4] x) => (float[batch,1,4,4] y) { y = Relu(x) }")),
    ),
    Case(
        "silent-specialisation",
        "error",
        model("g (float[batch,4] x) => (float[2,4] y) <float[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = Add(x, w) }"),
        unary("y = Relu(x)"),
        X,
    ),
    Case("opset", "error", unary("y = Relu(x)", opset=21), unary("y = Relu(x)", opset=20)),
    Case(
        "undeclared-domain",
        "error",
        model("g (float[batch,4] x) => (float[batch,4] y) { y = custom.Relu(x) }", domains=', "custom" : 1'),
        unary("y = Relu(x)"),
    ),
    Case(
        "control-flow",
        "error",
        model(
            """g (float[batch,4] x, bool c) => (float[batch,4] y) {
                y = If (c) <then_branch = a () => (float[batch,4] p) { p = Relu(x) },
                            else_branch = b () => (float[batch,4] q) { q = Neg(x) }>
            }"""
        ),
        model("g (float[batch,4] x, bool c) => (float[batch,4] y) { p = Relu(x) q = Neg(x) y = Where(c, p, q) }"),
    ),
    Case(
        "data-dependent-shape",
        "error",
        model("g (float[batch,4] x, bool[4] m) => (float[batch,n] y) { y = Compress <axis = 1> (x, m) }"),
        model("g (float[batch,4] x, bool[4] m) => (float[batch,4] y) <float o = {0}> { y = Where(m, x, o) }"),
    ),
    Case(
        "unsupported-operator",
        "error",
        model("g (int32[batch,4] x, int32[4] m) => (int32[batch,4] y) { y = BitwiseAnd(x, m) }"),
        model("g (bool[batch,4] x, bool[4] m) => (bool[batch,4] y) { y = And(x, m) }"),
    ),
    Case(
        "unsupported-type",
        "error",
        model("g (complex64[batch,4] x) => (complex64[batch,4] y) { y = Identity(x) }"),
        unary("y = Identity(x)"),
    ),
    Case(
        "double-tensor",
        "error",
        unary("d = Cast <to = 11> (x) y = Cast <to = 1> (d)"),
        unary("h = Cast <to = 10> (x) y = Cast <to = 1> (h)"),
    ),
    Case(
        "random-operator",
        "error",
        unary("n = RandomNormalLike(x) y = Add(x, n)"),
        unary("y = Dropout(x, ratio, off)", "<float ratio = {0.5}, bool off = {0}>"),
    ),
    Case(
        "resize-antialias",
        "error",
        resize('mode = "cubic", antialias = 1'),
        resize('mode = "linear", antialias = 0'),
    ),
    Case("resize-cubic", "warning", resize('mode = "cubic"'), resize('mode = "linear"')),
    Case(
        "resize-coordinates",
        "error",
        resize('mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"'),
        resize('mode = "linear", coordinate_transformation_mode = "align_corners"'),
    ),
    Case(
        "resize-size",
        "error",
        model(
            """g (float[1,1,4,4] x, int32[4] given) => (float[1,1,8,8] y) {
                sizes = Cast <to = 7> (given)  y = Resize <mode = "linear"> (x, , , sizes)
            }"""
        ),
        model(  # the batch alone is free: its size comes from a shape
            """g (float[batch,1,4,4] x) => (float[batch,1,8,8] y) <int64[2] sides = {8, 8}> {
                front = Shape <start = 0, end = 2> (x)  sizes = Concat <axis = 0> (front, sides)
                y = Resize <mode = "linear"> (x, , , sizes)
            }"""
        ),
    ),
    Case(
        "einsum-restricted",
        "error",
        unary('y = Einsum <equation = "...i -> ...i"> (x)'),
        unary("y = Identity(x)"),
    ),
    Case(
        "einsum",
        "warning",
        model('g (float[4,5] a, float[5,6] b) => (float[4,6] y) { y = Einsum <equation = "ij, jk -> ik"> (a, b) }'),
        model("g (float[4,5] a, float[5,6] b) => (float[4,6] y) { y = MatMul(a, b) }"),
    ),
    Case(
        "topk",
        "error",
        model("g (float[batch,4] x) => (float[batch,2] y) <int64[1] k = {2}> { y, i = TopK <sorted = 0> (x, k) }"),
        model("g (float[batch,4] x) => (float[batch,2] y) <int64[1] k = {2}> { y, i = TopK (x, k) }"),
    ),
    Case(
        "computed-axes",
        "error",
        model("g (float[1,1,4] x, int32[1] a) => (float[1,4] y) { axes = Cast <to = 7> (a) y = Squeeze(x, axes) }"),
        model("g (float[1,1,4] x) => (float[1,4] y) { axes = Constant <value_ints = [1]> () y = Squeeze(x, axes) }"),
    ),
    Case(
        "scatter-reduction",
        "error",
        unary('y = ScatterND <reduction = "add"> (x, i, u)', "<int64[1,1] i = {0}, float[1,4] u = {1, 2, 3, 4}>"),
        unary("y = ScatterND (x, i, u)", "<int64[1,1] i = {0}, float[1,4] u = {1, 2, 3, 4}>"),
    ),
    Case(
        "size-at-build",
        "error",
        unary("eye = EyeLike(x) y = Add(x, eye)"),
        model("g (float[3,4] x) => (float[3,4] y) { eye = EyeLike(x) y = Add(x, eye) }"),
    ),
    Case(
        "int64-arithmetic",
        "warning",
        model(
            """g (float[batch,4] x) => (float[batch] y) <int64 two = {2}> {
                best = ArgMax <axis = 1, keepdims = 0> (x)  twice = Mul(best, two)  y = Cast <to = 1> (twice)
            }"""
        ),
        model(  # the same arithmetic on an index
            """g (float[batch,4] x) => (float[batch] y) <int64 two = {2}, float[8] table = {1, 2, 3, 4, 5, 6, 7, 8}> {
                best = ArgMax <axis = 1, keepdims = 0> (x)  twice = Mul(best, two)  y = Gather(table, twice)
            }"""
        ),
    ),
    Case(
        "safe-softmax",
        "warning",
        unary("s = Softmax(x) bad = IsNaN(s) y = Where(bad, zero, s)", "<float zero = {0}>"),
        unary("y = Softmax(x)"),
    ),
    Case("wide-softmax", "warning", softmax("float16", 8193), softmax("float16", 8192)),
    Case(
        "broken-layer-norm",
        "warning",
        written_out_norm("float16"),
        written_out_norm("float"),
    ),
    Case(
        "inner-cast",
        "warning",
        unary("a = Relu(x) h = Cast <to = 10> (a) b = Neg(h) y = Cast <to = 1> (b)"),
        unary("h = Cast <to = 10> (x) b = Neg(h) y = Cast <to = 1> (b)"),
    ),
    Case(
        "constant-subgraph",
        "warning",
        unary("t = Sin(w) y = Add(x, t)", "<float[4] w = {1, 2, 3, 4}>"),
        unary("t = Shape(x) u = Expand(w, t) y = Add(x, u)", "<float[4] w = {1, 2, 3, 4}>"),
    ),
    Case("duplicated-initialiser", "error", twins(0), twins(SIZE)),
    Case(
        "source-path",
        "error",
        with_metadata("origin", 'File "/home/me/project/model.py", line 3'),
        with_metadata("namespace", ": package.Stage/model.encoder: package.Encoder/linear: aten.linear.default"),
    ),
]


def check(graph: onnx.ModelProto, spec: StageSpec | None = None, **options: object) -> list[Finding]:
    return lint(graph, spec or spec_of(graph), **options)  # type: ignore[arg-type]


def rules(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_rule_trips_alone_and_only_where_it_should(case: Case) -> None:
    found = check(case.bad, case.spec)
    assert {(finding.rule, finding.severity) for finding in found} == {(case.rule, case.severity)}
    assert check(case.good) == []
    if case.rule != "duplicated-initialiser":  # its weights are nowhere
        onnx.checker.check_model(case.good)


def test_every_rule_has_a_case_and_a_reason() -> None:
    assert sorted(case.rule for case in CASES) == sorted(rule.name for rule in RULES)
    assert all(len(rule.reason) > 40 and "\n" not in rule.reason for rule in RULES)


def test_a_finding_says_where_what_and_why_on_one_line() -> None:
    (finding,) = check(unary("y = Relu(x)", opset=21))
    assert (finding.rule, finding.node) == ("opset", "graph")
    assert finding.message.startswith("the graph has opset 21, the target reads up to 20. The target's parser refuses")
    assert "\n" not in finding.message


def test_errors_come_before_warnings() -> None:
    graph = unary("t = Sin(w) y = Add(x, t)", "<float[4] w = {1, 2, 3, 4}>")
    graph.doc_string = "/home/me/model.py"  # the last of the rules
    graph.opset_import[0].version = 21  # one of the first
    assert [finding.rule for finding in check(graph)] == ["opset", "source-path", "constant-subgraph"]


# Other ways to break the same rules: operator lines on x (batch, 4), with initialisers.
FURTHER = [
    (
        "control-flow",
        "n = Loop (m, , x) <body = b (int64 i, bool c, float[batch,4] s) => (bool c, float[batch,4] t) "
        "{ t = Relu(s) }> y = Identity(n)",
        "<int64 m = {2}>",
    ),
    ("data-dependent-shape", "i = NonZero(x) y = Relu(x)", ""),
    ("data-dependent-shape", "u, v, w, c = Unique(x) y = Relu(x)", ""),
    ("data-dependent-shape", "s = SequenceConstruct(x) y = SequenceAt(s, i)", "<int64 i = {0}>"),
    ("data-dependent-shape", "s = SplitToSequence(x) a = SequenceAt(s, i) y = Relu(x)", "<int64 i = {0}>"),
    ("data-dependent-shape", "o = Optional(x) y = OptionalGetElement(o)", ""),
    ("unsupported-operator", "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)", ""),
    ("unsupported-operator", "t = Transpose(x) p = MatMul(t, x) d = Det(p) y = Mul(x, d)", ""),
    ("unsupported-operator", "f = DFT <axis = 1> (x) y = Relu(x)", ""),
    ("random-operator", "n = RandomUniform <shape = [4]> () y = Add(x, n)", ""),
    ("random-operator", "n = Bernoulli(x) y = Add(x, n)", ""),
    ("random-operator", "y = Dropout(x, r, on)", "<float r = {0.5}, bool on = {1}>"),
    ("double-tensor", "y = Relu(x)", "<double[4] w = {1, 2, 3, 4}>"),
    ("topk", "v, i = TopK(w, k) y = Relu(x)", "<int64[1] k = {3840}, float[1] w = {1}>"),
    ("topk", "k = Shape <end = 1> (x) v, i = TopK(x, k) y = Relu(x)", ""),
    ("einsum-restricted", 'd = Einsum <equation = "ii -> i"> (w) y = Relu(x)', "<float[2,2] w = {1, 2, 3, 4}>"),
    ("computed-axes", "a = Shape <end = 1> (x) s = ReduceSum(x, a) y = Relu(x)", ""),
    ("computed-axes", "a = Shape <end = 1> (x) s = Slice(x, o, o, a) y = Relu(x)", "<int64[1] o = {0}>"),
    ("computed-axes", "a = Shape <end = 1> (x) s = Pad(x, o, , a) y = Relu(x)", "<int64[2] o = {0, 0}>"),
    ("computed-axes", "a = Shape <end = 1> (x) s = Unsqueeze(x, a) y = Relu(x)", ""),
    ("computed-axes", "a = Shape <end = 1> (x) y = CumSum(x, a)", ""),
    (
        "size-at-build",
        "d = Shape <end = 1> (x) o = OneHot(i, d, v) y = Relu(x)",
        "<int64[2] i = {0, 1}, float[2] v = {0, 1}>",
    ),
    ("size-at-build", "y = Hardmax <axis = 0> (x)", ""),
    ("int64-arithmetic", "b = ArgMax <axis = 1> (x) s = ReduceSum(b) t = Cast <to = 1> (s) y = Add(x, t)", ""),
    (
        "constant-subgraph",
        "t = Transpose(w) u = Transpose(t) y = Mul(x, u)",
        "<float[1,1] w = {1}>",
    ),
    ("inner-cast", "a = Relu(x) h = Cast <to = 6> (a) b = Cast <to = 1> (h) y = Neg(b)", ""),
]


@pytest.mark.parametrize(("rule", "body", "extra"), FURTHER)
def test_other_ways_to_break_a_rule(rule: str, body: str, extra: str) -> None:
    assert rules(check(unary(body, extra))) == {rule}


# What looks like a fault and is none.
HARMLESS = [
    ("float32 norms do not overflow", written_out_norm("float"), "fp32"),
    ("float32 norms do not overflow in a half graph either", written_out_norm("float"), "fp16"),
    ("float32 rows may be long", softmax("float", 100_000), "fp32"),
    (
        "a mask is not a precision",
        unary("m = Greater(x, o) f = Cast <to = 1> (m) y = Mul(x, f)", "<float o = {0}>"),
        "fp16",
    ),
    ("IsNaN not behind Softmax", unary("n = IsNaN(x) y = Where(n, o, x)", "<float o = {0}>"), "fp32"),
    (
        "a free batch as a number",
        unary("n = Size(x) m = Mul(n, n) f = Cast <to = 1> (m) y = Div(x, f)"),
        "fp32",
    ),
    ("K below the limit", unary("v, i = TopK(x, k) y = Relu(x)", "<int64[1] k = {3}>"), "fp32"),
    ("a fixed Hardmax axis", unary("y = Hardmax <axis = 1> (x)"), "fp32"),
    (
        "int8 weights are dequantised in the graph",
        unary("u = DequantizeLinear(w, s) y = Mul(x, u)", "<int8[4] w = {1, 2, 3, 4}, float s = {0.5}>"),
        "fp32",
    ),
    (
        "a free batch is arithmetic on shapes",
        unary(
            "n = Shape <end = 1> (x) m = Mul(n, two) s = Concat <axis = 0> (m, two) t = Reshape(x, s) "
            "y = Reshape(t, back)",
            "<int64[1] two = {2}, int64[2] back = {-1, 4}>",
        ),
        "fp32",
    ),
]


@pytest.mark.parametrize(("why", "graph", "precision"), HARMLESS)
def test_what_only_looks_like_a_fault_is_left_alone(why: str, graph: onnx.ModelProto, precision: str) -> None:
    assert check(graph, precision=precision) == [], why


def test_targets_differ_in_opset_and_domains() -> None:
    assert rules(check(unary("y = Relu(x)", opset=22))) == {"opset"}
    assert check(unary("y = Relu(x)", opset=22), target_opset=22) == []
    fused = model(
        "g (float[batch,4] x) => (float[batch,4] y) { y = com.microsoft.Gelu(x) }", domains=', "com.microsoft" : 1'
    )
    assert rules(check(fused)) == {"undeclared-domain"}
    assert check(fused, allowed_domains=ONNXRUNTIME) == []
    fused.graph.node[0].op_type = "NonZero"  # of that runtime's own, not the standard one
    assert check(fused, allowed_domains=ONNXRUNTIME) == []


def test_the_nodes_of_one_foreign_operator_are_one_finding() -> None:
    body = "a = custom.F(x) b = custom.F(a) y = custom.G(b)"
    graph = model(f"g (float[batch,4] x) => (float[batch,4] y) {{ {body} }}", domains=', "custom" : 1')
    found = [finding.message for finding in check(graph)]
    assert len(found) == 2
    assert "custom::F is of an undeclared domain: 'a' and 1 more" in found[0]


def test_bodies_of_local_functions_are_checked() -> None:
    graph = model(
        "g (float[batch,4] x) => (float[batch,4] y) { y = fssdeploy.F(x) }",
        domains=', "fssdeploy" : 1',
        functions='<domain: "fssdeploy", opset_import: ["" : 18]> F (a) => (b) { i = NonZero(a) b = Relu(a) }',
    )
    assert rules(check(graph)) == {"undeclared-domain", "data-dependent-shape"}
    allowed = frozenset({"fssdeploy"})
    assert rules(check(graph, allowed_domains=allowed)) == {"data-dependent-shape"}
    graph.functions[0].node[0].domain = "custom"
    for imports in (graph.opset_import, graph.functions[0].opset_import):
        imports.add(domain="custom", version=1)
    assert rules(check(graph, allowed_domains=allowed)) == {"undeclared-domain"}


def test_the_assumed_precision_counts_where_a_type_is_unknown() -> None:
    graph = model(
        """g (float[batch,4] x) => (float[batch,4] y) <float eps = {1}> {
            h = custom.F(x)  s = Mul(h, h)  m = ReduceMean(s)  r = Sqrt(m)  n = Div(h, r)  y = Cast <to = 1> (n)
        }""",
        domains=', "custom" : 1',
    )
    allowed = frozenset({"custom"})
    assert check(graph, allowed_domains=allowed) == []
    assert rules(check(graph, allowed_domains=allowed, precision="fp16")) == {"broken-layer-norm"}


# --- borders ---------------------------------------------------------------------------------------------------------


def test_a_declared_batch_may_be_a_number_in_the_file() -> None:
    assert check(model("g (float[3,4] x) => (float[3,4] y) { y = Relu(x) }"), X) == []


def test_a_batch_that_the_spec_fixes_may_not_be_free() -> None:
    fixed = spec_of(model("g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }"))
    found = check(unary("y = Relu(x)"), fixed)
    assert [(finding.rule, finding.node) for finding in found] == [("dynamic-dim", "x"), ("dynamic-dim", "y")]


def test_a_batch_of_another_name_is_not_the_declared_one() -> None:
    found = check(model("g (float[s0,4] x) => (float[s0,4] y) { y = Relu(x) }"), X)
    assert rules(found) == {"dynamic-dim"}
    assert "'s0' and declared batch" in found[0].message


def test_a_size_without_number_or_name_is_dynamic() -> None:
    graph = unary("y = Relu(x)")
    graph.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    assert "dynamic-dim" in rules(check(graph, X))


@pytest.mark.parametrize("declared", ["2", "batch"])
def test_one_specialised_output_of_two_is_found_whatever_it_declares(declared: str) -> None:
    outputs = f"float[batch,4] y, float[{declared},4] z"
    graph = model(f"g (float[batch,4] x) => ({outputs}) <int64[2] s = {{2, 4}}> {{ y = Relu(x) z = Reshape(y, s) }}")
    spec = StageSpec("stage", X.inputs, (*X.outputs, TensorSpec("z", "float32", ("batch", 4))))
    (finding,) = check(graph, spec)
    assert (finding.rule, finding.node) == ("silent-specialisation", "z")
    assert "dimension 'batch' is batch in 'x', 2 in 'z'" in finding.message


def test_a_free_picture_size_with_fixed_outputs_is_the_known_trap() -> None:
    graph = model(
        "g (float[1,3,h,w] picture) => (float[1,4] tokens) <float[1,4] t = {1, 2, 3, 4}> { tokens = Relu(t) }"
    )
    spec = StageSpec(
        "encoder",
        (TensorSpec("picture", "float32", (1, 3, 28, 28)),),
        (TensorSpec("tokens", "float32", (1, 4)),),
    )
    assert {"silent-specialisation", "symbolic-size"} <= rules(check(graph, spec))


def test_a_wrong_rank_and_a_missing_shape_break_the_contract() -> None:
    assert rules(check(model("g (float[batch] x) => (float[batch] y) { y = Relu(x) }"), X)) == {"io-shape"}
    graph = unary("y = Relu(x)")
    graph.graph.input[0].type.tensor_type.ClearField("shape")
    assert "io-shape" in rules(check(graph, X))


def test_every_missing_and_every_surplus_name_is_listed() -> None:
    found = check(model("g (float[batch,4] a) => (float[batch,4] b) { b = Relu(a) }"), X)
    assert {(finding.rule, finding.node) for finding in found} == {("io-names", name) for name in "abxy"}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/model.py",
        'File "/usr/lib/python3/site.py", line 1',
        "made in /tmp/work",
        "C:\\Users\\me\\model.py",
        "path=/srv/x",
    ],
)
def test_paths_are_found_wherever_text_can_stand(text: str) -> None:
    for place in ("model", "graph", "node", "input", "initialiser"):
        graph = unary("y = Add(x, w)", "<float[4] w = {1, 2, 3, 4}>")
        holder = {
            "model": graph,
            "graph": graph.graph,
            "node": graph.graph.node[0],
            "input": graph.graph.input[0],
            "initialiser": graph.graph.initializer[0],
        }[place]
        holder.doc_string = text
        assert rules(check(graph)) == {"source-path"}, place
        holder.doc_string = ""
        holder.metadata_props.add(key="note", value=text)
        assert rules(check(graph)) == {"source-path"}, place


def test_exporter_keys_and_absolute_weight_files_tell_the_source_too() -> None:
    assert rules(check(with_metadata("pkg.torch.onnx.stack_trace", "forward"))) == {"source-path"}
    assert rules(check(with_external("/home/me/weights.data"))) == {"source-path"}
    assert check(with_external("weights.data")) == []


@pytest.mark.parametrize("text", ["a/b/c", "see https://example.org/page/one", "tokens/second", "1 / 2", "and/or"])
def test_a_slash_alone_is_no_path(text: str) -> None:
    assert check(with_metadata("note", text)) == []


def save_twins(folder: Path, last_byte: bytes) -> Path:
    """Twins one after the other: zeros, except for the last byte of the second (a sparse file)."""
    with (folder / "w.data").open("wb") as stream:
        stream.seek(2 * SIZE - 1)
        stream.write(last_byte)
    (folder / "twins.onnx").write_bytes(twins(SIZE).SerializeToString())
    return folder / "twins.onnx"


def test_duplicates_in_a_weights_file_are_found_by_their_bytes(tmp_path: Path) -> None:
    spec = spec_of(twins(SIZE))
    (finding,) = lint(save_twins(tmp_path, b"\0"), spec)
    assert finding.rule == "duplicated-initialiser"
    assert "'a' and 'b' hold the same 64 MiB" in finding.message
    assert lint(save_twins(tmp_path, b"\1"), spec) == []
    (tmp_path / "w.data").unlink()
    with pytest.raises(IntegrityError, match=r"the values of 'a' are not in .*w\.data") as caught:
        lint(tmp_path / "twins.onnx", spec)
    assert caught.value.code == "weights_missing"


@pytest.mark.parametrize(("second", "expected"), [(0, {"duplicated-initialiser"}), (1, set())])
def test_duplicates_inside_the_graph_are_found_too(
    monkeypatch: pytest.MonkeyPatch, second: int, expected: set[str]
) -> None:
    monkeypatch.setattr("fssdeploy.export.lint.LARGE_TENSOR", 15)
    constants = f"<float[4] a = {{0, 0, 0, 0}}, float[4] b = {{0, 0, 0, {second}}}>"
    assert rules(check(unary("u = Mul(x, a) y = Add(u, b)", constants))) == expected


def test_large_weights_are_not_read_and_small_ones_are(tmp_path: Path) -> None:
    graph = unary("v, i = TopK(big, k) y = Relu(x)", "<int64[1] k = {4000}, float[1] big = {1}>")
    small, large = graph.graph.initializer
    large.dims[:] = [1 << 20]
    large.ClearField("float_data")
    small.ClearField("int64_data")
    for tensor, offset in ((small, 0), (large, 8)):
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.data")
        tensor.external_data.add(key="offset", value=str(offset))
    path = tmp_path / "stage.onnx"
    path.write_bytes(graph.SerializeToString())
    (tmp_path / "w.data").write_bytes(np.int64(4000).tobytes())  # the large one is not there at all
    found = [finding for finding in lint(path, X) if finding.rule == "topk"]
    assert [finding.message[:17] for finding in found] == ["K of TopK is 4000"]
    (tmp_path / "w.data").unlink()
    with pytest.raises(IntegrityError, match="'k'"):
        lint(path, X)


def test_files_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        lint(tmp_path / "none.onnx", X)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(IntegrityError, match=r"bad\.onnx' is not valid ONNX"):
        lint(tmp_path / "bad.onnx", X)
    with pytest.raises(IntegrityError, match="not valid ONNX"):
        lint(model("g (float[batch,4] x) => (float[batch,4] y) { y = unheard.F(x) }"), X)


def test_a_model_given_as_an_object_is_not_changed() -> None:
    graph = written_out_norm("float16")
    before = graph.SerializeToString()
    check(graph)
    assert graph.SerializeToString() == before


def test_linting_needs_no_torch() -> None:
    code = "import sys, fssdeploy.export.lint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the real stages -------------------------------------------------------------------------------------------------

TINY = fsdino.PRESETS["tiny"]
ALL = ("encoder", "enroll", "segment")


def export_stages(
    folder: Path, dtype: torch.dtype, precision: str, names: tuple[str, ...], *, dynamic: bool
) -> dict[str, StageFiles]:
    network = fsdino.build(TINY)
    fsdino.initialise_untrained(network, 0)
    modules, specs = fsdino.stages(network, dtype), fsdino.specs(TINY)
    chosen = specs if dynamic else {name: one_row(spec) for name, spec in specs.items()}
    return {name: export_stage(modules[name], chosen[name], folder, precision=precision, fuse=True) for name in names}


def lint_all(folder: Path, files: dict[str, StageFiles], precision: str, target_opset: int = 20) -> list[Finding]:
    specs, found = fsdino.specs(TINY), []
    for name, written in files.items():
        for file in filter(None, (written.portable, written.onnxruntime)):
            domains = ONNXRUNTIME if file == written.onnxruntime else frozenset()
            found += lint(
                folder / file,
                specs[name],
                precision=precision,
                target_opset=target_opset,
                allowed_domains=domains,
            )
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["fixed batch", "free batch"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, StageFiles]]:
    folder = tmp_path_factory.mktemp("fsdino")
    return folder, export_stages(folder, torch.float32, "fp32", ALL, dynamic=request.param)


def test_real_stages_break_no_rule(exported: tuple[Path, dict[str, StageFiles]]) -> None:
    folder, files = exported
    assert lint_all(folder, files, "fp32") == []


def test_real_fused_stages_are_for_one_runtime_only(exported: tuple[Path, dict[str, StageFiles]]) -> None:
    folder, files = exported
    fused = files["encoder"].onnxruntime
    assert fused is not None
    errors = [f for f in lint(folder / fused, fsdino.specs(TINY)["encoder"]) if f.severity == "error"]
    assert [finding.rule for finding in errors] == ["undeclared-domain"]
    assert "com.microsoft::MultiHeadAttention" in errors[0].message


def test_real_stages_break_the_contract_of_another_size(exported: tuple[Path, dict[str, StageFiles]]) -> None:
    folder, files = exported
    other = fsdino.specs(replace(TINY, image_size=224))["encoder"]
    found = lint(folder / files["encoder"].portable, other)
    assert {finding.node for finding in found if finding.rule == "io-shape"} == {"picture", "tokens", "embedding"}


@pytest.mark.parametrize(
    ("dtype", "precision", "opset", "names"),
    [
        pytest.param(torch.float16, "fp16", 20, ("enroll",), id="fp16"),
        pytest.param(torch.float16, "fp16", 20, ALL, id="fp16, all", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "bf16", 22, ALL, id="bf16, all", marks=pytest.mark.slow),
    ],
)
def test_real_half_stages_have_no_errors(
    tmp_path: Path, dtype: torch.dtype, precision: str, opset: int, names: tuple[str, ...]
) -> None:
    files = export_stages(tmp_path, dtype, precision, names, dynamic=True)
    found = lint_all(tmp_path, files, precision, opset)
    assert [finding for finding in found if finding.severity == "error"] == []
    # The normalisation of the picture, norms and means are computed in float32: casts, and nothing else.
    assert rules(found) == {"inner-cast"}


def test_what_the_exporter_leaves_behind_is_found(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4).eval()
    path = tmp_path / "plain.onnx"
    program = torch.onnx.export(module, (torch.zeros(2, 4),), dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    program.save(str(path))
    found = check(onnx.load(path))
    assert rules(found) == {"source-path"}
    assert re.search(r"paths or stack traces .* and \d+ more", found[0].message)
