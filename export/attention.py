"""What becomes of the opaque attention nodes in a freshly traced graph (fssdeploy.modules.attention).

One trace gives two files: the portable one in standard operators, and one for ONNX Runtime with its fused kernel, which
keeps no heads x N x N scores: at ViT-B and 518 pixels 3 % faster and 195 MiB smaller
(benchmarks/results/latency-fsdino-base.json). Both read the same weights file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from fssdeploy.modules.attention import ONNX_OPERATOR

DOMAIN, OPERATOR = ONNX_OPERATOR.split("::")
FUSED_DOMAIN = "com.microsoft"


def count_attention(model: onnx.ModelProto) -> int:
    """How many opaque attention nodes the graph holds."""
    return sum(_is_attention(node) for node in model.graph.node)


def expand_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which attention is MatMul, Softmax, MatMul; q alone is scaled."""
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]
    }
    expanded = _without_domain(model)
    nodes: list[NodeProto] = []
    constants: dict[str, onnx.TensorProto] = {}
    for node in model.graph.node:
        nodes.extend(_expansion(node, types[node.input[0]], constants) if _is_attention(node) else [node])
    _replace_nodes(expanded, nodes)
    expanded.graph.initializer.extend(constants.values())
    return expanded


def fuse_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which attention is ONNX Runtime's MultiHeadAttention (float32, CPU and CUDA)."""
    fused = _without_domain(model)
    nodes = []
    for node in model.graph.node:
        replacement = copy.deepcopy(node)
        if _is_attention(node):
            replacement.op_type, replacement.domain = "MultiHeadAttention", FUSED_DOMAIN
        nodes.append(replacement)
    _replace_nodes(fused, nodes)
    fused.opset_import.append(helper.make_opsetid(FUSED_DOMAIN, 1))
    return fused


def _is_attention(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == OPERATOR


def _expansion(node: NodeProto, elem_type: int, constants: dict[str, onnx.TensorProto]) -> Iterator[NodeProto]:
    """(B, N, C) tensors -> heads apart, scaled scores, softmax, heads together."""
    heads, scale = (helper.get_attribute_value(attribute) for attribute in _attributes(node, "num_heads", "scale"))
    stem = node.name or node.output[0]
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)

    def constant(name: str, value: np.ndarray) -> str:
        constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    apart = constant(f"attention_heads_{heads}", np.array([0, 0, heads, -1], np.int64))
    together = constant("attention_together", np.array([0, 0, -1], np.int64))
    factor = constant(f"attention_scale_{scale:.9g}_{elem_type}", np.array(scale, dtype))

    def make(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs, [output], name=f"{stem}/{output.rsplit('/', 1)[-1]}", **attributes)

    q, k, v = node.input[:3]
    yield make("Mul", [q, factor], f"{stem}/scaled")
    for source, name, order in ((f"{stem}/scaled", "q", [0, 2, 1, 3]), (k, "k", [0, 2, 3, 1]), (v, "v", [0, 2, 1, 3])):
        yield make("Reshape", [source, apart], f"{stem}/{name}_heads")
        yield make("Transpose", [f"{stem}/{name}_heads"], f"{stem}/{name}", perm=order)
    yield make("MatMul", [f"{stem}/q", f"{stem}/k"], f"{stem}/scores")
    yield make("Softmax", [f"{stem}/scores"], f"{stem}/weights", axis=-1)
    yield make("MatMul", [f"{stem}/weights", f"{stem}/v"], f"{stem}/mixed")
    yield make("Transpose", [f"{stem}/mixed"], f"{stem}/merged", perm=[0, 2, 1, 3])
    yield helper.make_node("Reshape", [f"{stem}/merged", together], list(node.output), name=f"{stem}/out")


def _attributes(node: NodeProto, *names: str) -> list[onnx.AttributeProto]:
    found = {attribute.name: attribute for attribute in node.attribute}
    return [found[name] for name in names]


def _without_domain(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model that no longer imports the domain of the opaque nodes."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    return result


def _replace_nodes(model: onnx.ModelProto, nodes: list[NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
