"""Operations of fssdeploy.kernels as ONNX models of one node, with inputs and float64 results computed in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

Arrays = tuple[np.ndarray, ...]
FLOATS = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Case:
    """`inputs` are float32 (or int64), in the order of the node; `compute` takes them in float64.

    `outputs` name the type of each result: "wide" is float32 whatever the inputs are, "same" that of the first input.
    The inputs whose places are in `always_float32` are so in every model.
    """

    operation: str
    inputs: Arrays
    compute: Callable[..., Arrays]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    always_float32: tuple[int, ...] = ()

    def arguments(self, dtype: str) -> dict[str, np.ndarray]:
        """Inputs by name, floats rounded to `dtype`."""
        return {
            f"input{place}": array
            if array.dtype == np.int64 or place in self.always_float32
            else array.astype(FLOATS[dtype])
            for place, array in enumerate(self.inputs)
        }

    def expected(self, dtype: str) -> Arrays:
        """Results for the rounded inputs: indices int64, everything else float64."""
        exact = (a if a.dtype == np.int64 else a.astype(np.float64) for a in self.arguments(dtype).values())
        return self.compute(*exact, **self.attributes)

    def model(self, dtype: str) -> onnx.ModelProto:
        """One node without a body; all sizes are free."""
        arguments = self.arguments(dtype)
        results = {f"output{number}": array.ndim for number, array in enumerate(self.expected(dtype))}
        kinds = {"wide": np.float32, "same": FLOATS[dtype], "half": np.float16, "index": np.int64}
        node = helper.make_node(
            self.operation, list(arguments), list(results), "op", domain="fssdeploy", **self.attributes
        )
        graph = helper.make_graph(
            [node],
            "one_operation",
            [_free(name, array.dtype, array.ndim) for name, array in arguments.items()],
            [_free(name, kinds[kind], rank) for (name, rank), kind in zip(results.items(), self.outputs, strict=True)],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fssdeploy", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def compare(found: Arrays, expected: Arrays, dtype: str, accuracy: float = 1e-5) -> None:
    """Indices equal; numbers within `accuracy` of the largest in float32, 1.5 units of the last place in float16."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        if other.dtype == np.int64:
            np.testing.assert_array_equal(one, other)
            continue
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.where(finite, 0, one.astype(np.float64)), np.where(finite, 0, other))
        share = accuracy if one.dtype == np.float32 else 1e-3
        scale = max(1.0, np.abs(other[finite]).max(initial=0))
        np.testing.assert_allclose(one[finite].astype(np.float64), other[finite], atol=share * scale, rtol=0)


def _free(name: str, dtype: Any, rank: int) -> onnx.ValueInfoProto:
    shape = [f"{name}_{axis}" for axis in range(rank)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _unit_rows(rows: np.ndarray, eps: float, half: int) -> Arrays:
    return (rows / np.maximum(np.sqrt((rows**2).sum(-1, keepdims=True)), eps),)


def _masked_means(query: np.ndarray, support: np.ndarray, weights: np.ndarray) -> Arrays:
    total = weights.sum(2, keepdims=True)
    products = np.einsum("ic,kjc,kmj->kmi", query, support, weights)
    return (np.where(total == 0, 0, products / np.where(total == 0, 1, total)),)


def _masked_max(query: np.ndarray, support: np.ndarray, weights: np.ndarray, exclude: int) -> Arrays:
    weighted = np.einsum("ic,kjc,kmj->kmij", query, support, weights)
    if exclude:
        weighted[np.broadcast_to((weights == 0)[:, :, None], weighted.shape)] = -np.inf
    values = weighted.max(3)
    return values, np.where(values == -np.inf, -1, weighted.argmax(3))


def _mutual_argmax(query: np.ndarray, support: np.ndarray) -> Arrays:
    products = np.einsum("ic,kjc->kij", query, support)
    return products.max(2), products.argmax(2), products.max(1), products.argmax(1)


def _hypercorrelation(query: np.ndarray, support: np.ndarray, weights: np.ndarray) -> Arrays:
    masked = support * weights[:, None]
    lengths = (np.linalg.norm(rows, axis=2) + 1e-5 for rows in (query, masked))
    products = np.einsum("lic,ljc->lij", query, masked)
    return (np.maximum(products / np.einsum("li,lj->lij", *lengths), 0),)


def _correlation_projection(query: np.ndarray, support: np.ndarray, projection: np.ndarray) -> Arrays:
    return (np.maximum(np.einsum("ic,kjc->kij", query, support), 0) @ projection,)


def _spectral_edges(
    features: np.ndarray, labels: np.ndarray, table: np.ndarray, evidence: np.ndarray,
    height: int, width: int, sigma: float, broadcast: str, negative: str,
) -> Arrays:  # fmt: skip
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "shift": lambda c: (1 + c) / 2,
        "clip": lambda c: np.maximum(c, 0),
        "exp": lambda c: np.exp(c - 1),
        "keep": lambda c: c,
    }
    row, column = np.divmod(np.arange(height * width), width)
    distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    nearness = np.exp(-distance / (2 * sigma**2)) + rules[negative](table)[np.ix_(labels, labels)]
    g = np.exp(evidence)
    spread = {
        "product": np.outer(g, g),
        "geometric": np.sqrt(np.outer(g, g)),
        "mean": (g[:, None] + g) / 2,
        "row": np.outer(g, np.ones_like(g)),
        "column": np.outer(np.ones_like(g), g),
        "none": np.ones_like(distance),
    }
    edges = rules[negative](features @ features.T) * nearness * spread[broadcast]
    return edges, edges.sum(1)


def _calibrated_attention(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, calibration: np.ndarray,
    start: int, strength: float, span: str, scale: float,
) -> Arrays:  # fmt: skip
    logits = scale * np.einsum("bnd,bsd->bns", query, keys)
    count = calibration.shape[1]
    if count:
        part = logits[:, :, start : start + count]
        axes = (1, 2) if span == "global" else (2,)
        low, high = part.min(axes, keepdims=True), part.max(axes, keepdims=True)
        norm = (part - low) / (high - low + 1e-7)
        part += strength * np.minimum(0, norm + calibration[:, None] - 1)
    weights = np.exp(logits - logits.max(2, keepdims=True))
    return (weights / weights.sum(2, keepdims=True) @ values,)


def _cases() -> dict[str, Case]:
    generator = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    def unit(*shape: int) -> np.ndarray:
        rows = normal(*shape)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def masks(shots: int, count: int, columns: int) -> np.ndarray:
        """Soft masks with zeros; the last of the last shot is empty."""
        weights = generator.random((shots, count, columns), np.float32)
        weights[weights < 0.4] = 0
        weights[-1, -1] = 0
        return weights

    rows = normal(3, 13, 37)
    rows[1, 4] = 0
    cases = {
        f"unit_rows-half{half}": Case(
            "UnitRows", (rows,), _unit_rows, ("half" if half else "same",), {"eps": 1e-6, "half": half}
        )
        for half in (0, 1)
    }
    for shots, columns in ((1, 301), (2, 53), (5, 7)):
        query, support, weights = unit(139, 67), unit(shots, columns, 67), masks(shots, 2, columns)
        cases[f"masked_means-k{shots}"] = Case("MaskedMeans", (query, support, weights), _masked_means, ("same",))
        for exclude in (0, 1):
            cases[f"masked_max-exclude{exclude}-k{shots}"] = Case(
                "MaskedMax", (query, support, weights), _masked_max, ("wide", "index"), {"exclude": exclude}
            )
        outputs = ("wide", "index", "wide", "index")
        cases[f"mutual_argmax-k{shots}"] = Case("MutualArgmax", (query, support), _mutual_argmax, outputs)
        cases[f"correlation_projection-k{shots}"] = Case(
            "CorrelationProjection", (query, support, normal(shots, columns, 11)), _correlation_projection, ("same",)
        )
    features = normal(3, 17, 9)
    features[0, 2] = 0
    cases["hypercorrelation"] = Case(
        "Hypercorrelation", (features, normal(3, 29, 9), masks(1, 2, 29)[0, 0]), _hypercorrelation, ("same",)
    )
    # All products are equal: the smallest index that counts wins.
    same = np.full((1, 5, 8), 0.25, np.float32)
    weights = np.array([[[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]], np.float32)
    for exclude in (0, 1):
        cases[f"masked_max-ties-exclude{exclude}"] = Case(
            "MaskedMax", (same[0], same, weights), _masked_max, ("wide", "index"), {"exclude": exclude}
        )
    cases["mutual_argmax-ties"] = Case("MutualArgmax", (same[0], same), _mutual_argmax, ("wide", "index") * 2)
    table = unit(4, 4)
    for broadcast in ("product", "geometric", "mean", "row", "column", "none"):
        for negative in ("shift", "clip", "exp", "keep"):
            attributes = {"height": 13, "width": 11, "sigma": 2.5, "broadcast": broadcast, "negative": negative}
            labels = generator.integers(0, 4, 143)
            inputs = (unit(143, 19), labels, table @ table.T, 0.3 * normal(143))
            cases[f"spectral_edges-{broadcast}-{negative}"] = Case(
                "SpectralEdges", inputs, _spectral_edges, ("same", "wide"), attributes
            )
    for name, span, start, count, keys in (
        ("row", "row", 53, 97, 161),
        ("global", "global", 53, 97, 161),
        ("first", "row", 0, 5, 9),
        ("last", "global", 4, 5, 9),
        ("plain", "row", 3, 0, 161),
        ("one-key", "row", 2, 1, 9),
    ):
        tensors = (normal(2, 71, 24), normal(2, keys, 24), normal(2, keys, 7))
        attributes = {"start": start, "strength": 10.0, "span": span, "scale": 24**-0.5}
        cases[f"calibrated_attention-{name}"] = Case(
            "CalibratedAttention",
            (*tensors, generator.random((2, count), np.float32)),
            _calibrated_attention,
            ("same",),
            attributes,
        )
    for name, places in (("spectral_edges-mean-shift", (2, 3)), ("calibrated_attention-row", (3,))):
        cases[f"{name}-mixed"] = replace(cases[name], always_float32=places)
    return cases


CASES = _cases()
