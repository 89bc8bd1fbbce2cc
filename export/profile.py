"""What a stage costs by its graph: floating-point operations and parameters, without running it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from fssdeploy.errors import InputError
from fssdeploy.export.graph import Graph, node_attribute, read_model

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape]


def count_flops(path_or_model: Path | onnx.ModelProto, batch: int = 1) -> dict[str, float]:
    """FLOPs by operator type and their sum under "total"; a multiply-add counts 2.

    Counted are matrix products, convolutions and ONNX Runtime's fused attention. Everything else (biases, norms,
    softmax, activations, resizing) counts 0: it is bound by memory, not by arithmetic. `batch` stands for free
    dimensions; a file with a fixed batch is counted at that batch.
    Raises InputError if there is no such file or a shape is not known, IntegrityError if it is not ONNX.
    """
    model, _ = read_model(path_or_model)
    graph = Graph(_with_batch(model, batch))
    flops: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op_type in _FLOPS:
            flops[node.op_type] += _FLOPS[node.op_type](node, lambda name: _shape(graph, name))
    return {**{name: float(count) for name, count in flops.items()}, "total": float(flops.total())}


def parameters(path_or_model: Path | onnx.ModelProto) -> int:
    """How many numbers the weights and baked tables hold; shapes and axes (int64) and scalars do not count.

    Raises InputError if there is no such file, IntegrityError if it is not ONNX.
    """
    model, _ = read_model(path_or_model)
    weights = (t for t in model.graph.initializer if t.dims and t.data_type != TensorProto.INT64)
    return sum(math.prod(tensor.dims) for tensor in weights)


def _with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy in which the free dimensions of the inputs are `batch`, wherever their names stand."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    free = {dim.dim_param for value in bound.graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    for value in (*bound.graph.input, *bound.graph.output, *bound.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in free:
                dim.dim_value = batch
    return bound


def _shape(graph: Graph, name: str) -> Shape:
    shape = graph.shapes.get(name)
    numbers = tuple(dim for dim in shape or () if isinstance(dim, int))
    if shape is None or len(numbers) < len(shape):
        raise InputError(
            "shape_unknown",
            f"the shape of '{name}' cannot be inferred",
            "operations cannot be counted without it",
            "Export the stage with sizes that follow from its inputs' shapes.",
        )
    return numbers


def _matmul(node: NodeProto, shape: ShapeOf) -> int:
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[-1]


def _gemm(node: NodeProto, shape: ShapeOf) -> int:
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[0 if node_attribute(node, "transA", 0) else 1]


def _conv(node: NodeProto, shape: ShapeOf) -> int:
    """Every output value is a sum over the kernel's (channels / groups, *window)."""
    return 2 * math.prod(shape(node.output[0])) * math.prod(shape(node.input[1])[1:])


def _conv_transpose(node: NodeProto, shape: ShapeOf) -> int:
    """Every input value is spread over the kernel's (channels / groups, *window)."""
    return 2 * math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])


def _attention(node: NodeProto, shape: ShapeOf) -> int:
    """q (B, N, C) against k (B, M, C), then the mix of v (B, M, C): 4 N M C for each picture, whatever the heads."""
    (batch, rows, width), (_, columns, mixed) = shape(node.input[0]), shape(node.input[2])
    return 2 * batch * rows * columns * (width + mixed)


_FLOPS: dict[str, Callable[[NodeProto, ShapeOf], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MultiHeadAttention": _attention,
}
