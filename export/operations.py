"""Nodes of the operations of fssdeploy.kernels in an ONNX graph: with a function body each, or replaced by it.

Both forms compute the same. `inlined` is for every engine, and what an artifact holds. `with_functions` keeps each
operation as one node of the domain `fssdeploy` that carries its body along, so that the file still runs everywhere: an
engine without a kernel of that name computes the body.

ONNX Runtime looks for a kernel first. Once the library `fssdeploy_ort_ops` (kernels/csrc/ort) is registered in the
session options, every node whose name the library knows is its own, overload or not, and the body is not looked at even
where no kernel fits the types. So the library takes every type that such a node may have (float16, bfloat16, float32),
and knows only names that it should win: all of its operations on the CPU; with FSSDEPLOY_CUDA_KERNELS, the folder of
compiled GPU kernels, those alone that have such kernels, while the bodies of the others run on the GPU.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, inliner, shape_inference

from fssdeploy.export.operation_bodies import OPERATIONS, Body
from fssdeploy.kernels.onnx_node import DOMAIN

STANDARD = ("", "ai.onnx")
# The first format of files in which two functions may have one name.
IR_WITH_OVERLOADS = 10


def with_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every operation of the domain has its body; the model's opset must be 18 or newer.

    Nodes inside If, Loop and Scan are left alone. Where attributes of two nodes shape different bodies, all but the
    first are overloads, which only files of IR version 10 and consumers that know it can tell apart.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    opsets = [entry for entry in model.opset_import if entry.domain in STANDARD]
    bodies: dict[tuple[str, str], FunctionProto] = {}
    for node in filter(_is_operation, result.graph.node):
        variant = _variant(node)
        if (node.op_type, variant) not in bodies:
            first = all(operation != node.op_type for operation, _ in bodies)
            bodies[node.op_type, variant] = _function(node, "" if first else variant, opsets)
        node.overload = bodies[node.op_type, variant].overload
    result.functions.extend(bodies.values())
    if bodies and all(entry.domain != DOMAIN for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    if any(body.overload for body in bodies.values()):
        result.ir_version = max(result.ir_version, IR_WITH_OVERLOADS)
    return result


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which standard operators stand for every operation; other nodes of the domain stay."""
    if not any(map(_is_operation, model.graph.node)):
        return model
    names = [(DOMAIN, operation) for operation in OPERATIONS]
    result = inliner.inline_selected_functions(with_functions(model), names)
    _settle_casts(result)
    if all(node.domain != DOMAIN for node in result.graph.node):
        kept = [entry for entry in result.opset_import if entry.domain != DOMAIN]
        del result.opset_import[:]
        result.opset_import.extend(kept)
    return result


def _is_operation(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in OPERATIONS


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _shaping(node: NodeProto) -> dict[str, Any]:
    """The attributes that shape the body of this node, strings as text."""
    values = _attributes(node)
    chosen = {name: values[name] for name in OPERATIONS[node.op_type].shaping}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in chosen.items()}


def _variant(node: NodeProto) -> str:
    return "_".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in _shaping(node).values())


def _function(node: NodeProto, overload: str, opsets: list[onnx.OperatorSetIdProto]) -> FunctionProto:
    operation = OPERATIONS[node.op_type]
    body = Body(_shaping(node))
    outputs = operation.write(body, *operation.inputs)
    attributes = [*operation.shaping, *operation.referenced]
    return helper.make_function(
        DOMAIN, node.op_type, operation.inputs, outputs, body.nodes, opsets, attributes, overload=overload
    )


def _settle_casts(model: onnx.ModelProto) -> None:
    """Drop casts to the type that a value has anyway, and say of the others which type they give.

    Bodies serve any type, so they cast always. Without this, float32 graphs would be full of casts to float32.
    """
    if any(attribute.type == AttributeProto.GRAPH for node in model.graph.node for attribute in node.attribute):
        return  # a name could be read in there
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    inferred = shape_inference.infer_shapes(model).graph
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        types[value.name] = value.type.tensor_type.elem_type
    outputs = {value.name for value in model.graph.output}
    same: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type in ("Cast", "CastLike") and node.domain in STANDARD:
            target = _attributes(node)["to"] if node.op_type == "Cast" else types.get(node.input[1])
            if target and target == types.get(node.input[0], TensorProto.UNDEFINED) and node.output[0] not in outputs:
                same[node.output[0]] = node.input[0]
                continue
            if target and node.op_type == "CastLike":
                kept.append(helper.make_node("Cast", node.input[:1], node.output, node.name, to=target))
                continue
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
