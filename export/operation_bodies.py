"""What the operations of fssdeploy.kernels compute, in operators of the ONNX standard (opset 18 or newer).

One function an operation; what it returns are the outputs. Everything is computed in float32 whatever the inputs are,
since engines accumulate half precision as they like, and cast back where the operation promises the type of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

TO_THE_END = np.iinfo(np.int64).max
# As in fssdeploy.kernels.scma and correlation: what keeps the range of equal logits, and features of length zero, from
# dividing by zero.
RANGE_EPS = 1e-7
LENGTH_EPS = 1e-5


class Body:
    """Nodes in the order of their making. Calling it adds one and returns the name of its output.

    `given` are the attributes whose values shape the body; others may differ between the nodes that it serves.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.nodes: list[NodeProto] = []

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def wide(self, value: str) -> str:
        """`value` in float32."""
        return self("Cast", value, to=TensorProto.FLOAT)

    def constant(self, value: np.ndarray | float) -> str:
        """An array, or a float32 number."""
        array = value if isinstance(value, np.ndarray) else np.array(value, np.float32)
        return self("Constant", value=numpy_helper.from_array(array))

    def integers(self, *values: int) -> str:
        """An int64 vector: axes, a shape, a place."""
        return self("Constant", value_ints=list(values))

    def attribute(self, name: str) -> str:
        """A float attribute of the node that the body stands for, as a scalar."""
        output = self("Constant")
        reference = AttributeProto(name="value_float", ref_attr_name=name, type=AttributeProto.FLOAT)
        self.nodes[-1].attribute.append(reference)
        return output

    def affinity(self, query: str, support: str) -> str:
        """Inner products (k, Nq, Ns) of rows (Nq, C) and (k, Ns, C)."""
        return self("MatMul", self.wide(query), self("Transpose", self.wide(support), perm=[0, 2, 1]))

    def best(self, values: str, axis: int) -> tuple[str, str]:
        """The largest values along an axis that goes, and the smallest of their indices."""
        return (
            self("ReduceMax", values, self.integers(axis), keepdims=0),
            self("ArgMax", values, axis=axis, keepdims=0),
        )


@dataclass(frozen=True)
class Operation:
    """`shaping` names the attributes that change the body, `referenced` those that it reads from the node."""

    inputs: tuple[str, ...]
    write: Callable[..., tuple[str, ...]]
    shaping: tuple[str, ...] = ()
    referenced: tuple[str, ...] = ()


def unit_rows(body: Body, rows: str) -> tuple[str, ...]:
    exact = body.wide(rows)
    norm = body("ReduceL2", exact, body.integers(-1))
    unit = body("Div", exact, body("Max", norm, body.attribute("eps")))
    return (body("Cast", unit, to=TensorProto.FLOAT16) if body.given["half"] else body("CastLike", unit, rows),)


def masked_means(body: Body, query: str, support: str, weights: str) -> tuple[str, ...]:
    masks = body.wide(weights)
    total = body("ReduceSum", masks, body.integers(2))
    # Divided by infinity, an empty mask has a mean of zero.
    divisor = body("Where", body("Equal", total, body.constant(0)), body.constant(np.inf), total)
    means = body("MatMul", body("Div", masks, divisor), body.wide(support))
    return (body("CastLike", body("MatMul", means, body("Transpose", body.wide(query), perm=[1, 0])), query),)


def masked_max(body: Body, query: str, support: str, weights: str) -> tuple[str, ...]:
    masks = body.wide(weights)
    columns = body("Unsqueeze", masks, body.integers(2))
    weighted = body("Mul", body("Unsqueeze", body.affinity(query, support), body.integers(1)), columns)
    if not body.given["exclude"]:
        return body.best(weighted, 3)
    nothing = body.constant(-np.inf)
    values, indices = body.best(body("Where", body("Equal", columns, body.constant(0)), nothing, weighted), 3)
    # From the mask, not from the maximum: of infinities alone OpenVINO finds the largest finite number.
    heaviest = body("ReduceMax", body("Abs", masks), body.integers(2))
    empty = body("Equal", heaviest, body.constant(0))
    return body("Where", empty, nothing, values), body("Where", empty, body.integers(-1), indices)


def mutual_argmax(body: Body, query: str, support: str) -> tuple[str, ...]:
    products = body.affinity(query, support)
    return (*body.best(products, 2), *body.best(products, 1))


def hypercorrelation(body: Body, query: str, support: str, weights: str) -> tuple[str, ...]:
    masked = body("Mul", body.wide(support), body("Unsqueeze", body.wide(weights), body.integers(1)))
    units = []
    for features in (body.wide(query), masked):
        length = body("ReduceL2", features, body.integers(2))
        units.append(body("Div", features, body("Add", length, body.constant(LENGTH_EPS))))
    cosines = body("MatMul", units[0], body("Transpose", units[1], perm=[0, 2, 1]))
    return (body("CastLike", body("Relu", cosines), query),)


def correlation_projection(body: Body, query: str, support: str, projection: str) -> tuple[str, ...]:
    correlation = body("Relu", body.affinity(query, support))
    return (body("CastLike", body("MatMul", correlation, body.wide(projection)), query),)


def spectral_edges(body: Body, features: str, labels: str, table: str, evidence: str) -> tuple[str, ...]:
    given, exact = body.given, body.wide(features)
    height, width = given["height"], given["width"]
    # A Gaussian of two cells is the product of one down and one across.
    down = body.constant(_gaussian(height, given["sigma"]).reshape(height, 1, height, 1))
    across = body.constant(_gaussian(width, given["sigma"]).reshape(1, width, 1, width))
    nearness = body("Reshape", body("Mul", down, across), body.integers(height * width, height * width))
    regions = _without_negatives(body, body.wide(table), given["negative"])
    alike = body("Gather", body("Gather", regions, labels, axis=0), labels, axis=1)
    cosines = body("MatMul", exact, body("Transpose", exact, perm=[1, 0]))
    edges = body("Mul", _without_negatives(body, cosines, given["negative"]), body("Add", nearness, alike))
    edges = _broadcast(body, edges, body.wide(evidence), given["broadcast"])
    return body("CastLike", edges, features), body("ReduceSum", edges, body.integers(1), keepdims=0)


def calibrated_attention(body: Body, query: str, keys: str, values: str, calibration: str) -> tuple[str, ...]:
    scaled = body("Mul", body.wide(query), body.attribute("scale"))
    logits = body("MatMul", scaled, body("Transpose", body.wide(keys), perm=[0, 2, 1]))
    start = body.integers(body.given["start"])
    end = body("Add", start, body("Shape", calibration, start=1, end=2))
    last = body.integers(2)
    calibrated = body("Slice", logits, start, end, last)
    range_axes = body.integers(1, 2) if body.given["span"] == "global" else last
    low, high = (body(reduction, calibrated, range_axes) for reduction in ("ReduceMin", "ReduceMax"))
    extent = body("Add", body("Sub", high, low), body.constant(RANGE_EPS))
    norm = body("Div", body("Sub", calibrated, low), extent)
    excess = body("Sub", body("Unsqueeze", body.wide(calibration), body.integers(1)), body.constant(1))
    shortfall = body("Min", body("Add", norm, excess), body.constant(0))
    biased = body("Add", calibrated, body("Mul", shortfall, body.attribute("strength")))
    before = body("Slice", logits, body.integers(0), start, last)
    after = body("Slice", logits, end, body.integers(TO_THE_END), last)
    weights = body("Softmax", body("Concat", before, biased, after, axis=2), axis=2)
    return (body("CastLike", body("MatMul", weights, body.wide(values)), query),)


def _gaussian(count: int, sigma: float) -> np.ndarray:
    index = np.arange(count)
    values: np.ndarray = np.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2)).astype(np.float32)
    return values


def _without_negatives(body: Body, cosines: str, rule: str) -> str:
    if rule == "shift":
        return body("Mul", body("Add", cosines, body.constant(1)), body.constant(0.5))
    if rule == "clip":
        return body("Relu", cosines)
    return body("Exp", body("Sub", cosines, body.constant(1))) if rule == "exp" else cosines


def _broadcast(body: Body, edges: str, evidence: str, rule: str) -> str:
    """Edges (N, N) times B(g) of g = exp(evidence), (N,)."""
    if rule == "none":
        return edges
    if rule == "geometric":
        evidence = body("Mul", evidence, body.constant(0.5))
    across = body("Exp", evidence)
    down = body("Unsqueeze", across, body.integers(1))
    if rule == "mean":
        return body("Mul", edges, body("Mul", body("Add", down, across), body.constant(0.5)))
    if rule != "column":
        edges = body("Mul", edges, down)
    return edges if rule == "row" else body("Mul", edges, across)


# By the name of the node.
OPERATIONS = {
    "UnitRows": Operation(("rows",), unit_rows, ("half",), ("eps",)),
    "MaskedMeans": Operation(("query", "support", "weights"), masked_means),
    "MaskedMax": Operation(("query", "support", "weights"), masked_max, ("exclude",)),
    "MutualArgmax": Operation(("query", "support"), mutual_argmax),
    "Hypercorrelation": Operation(("query", "support", "weights"), hypercorrelation),
    "CorrelationProjection": Operation(("query", "support", "projection"), correlation_projection),
    "SpectralEdges": Operation(
        ("features", "labels", "table", "evidence"),
        spectral_edges,
        ("height", "width", "sigma", "broadcast", "negative"),
    ),
    "CalibratedAttention": Operation(
        ("query", "keys", "values", "calibration"), calibrated_attention, ("start", "span"), ("strength", "scale")
    ),
}
