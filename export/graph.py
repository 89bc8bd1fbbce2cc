"""ONNX graphs to look things up in: read without their large weights, with types and shapes inferred."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, inliner, numpy_helper, shape_inference
from onnx.external_data_helper import ExternalDataInfo

from fssdeploy.errors import IntegrityError
from fssdeploy.files import open_file

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
SMALL_TENSOR = 64 << 10  # bytes: below this an initialiser may hold a shape, an axis or a size
UNKNOWN = "?"  # a dimension that has neither a number nor a name

Dim = int | str


def read_model(source: Path | onnx.ModelProto) -> tuple[onnx.ModelProto, Path | None]:
    """A model with its large weights left on disk, and the folder they are in (None for a model given as an object).

    Raises InputError if there is no such file, IntegrityError if it is not ONNX or its weights are missing.
    """
    if isinstance(source, onnx.ModelProto):
        return source, None
    with open_file(source) as stream:
        try:
            model = onnx.load_model_from_string(stream.read())
        except DecodeError as error:
            raise _unreadable(f"'{source}'", str(error)) from error
    folder = Path(source).parent
    for tensor in model.graph.initializer:
        if is_external(tensor) and 0 < stored_bytes(tensor) <= SMALL_TENSOR:
            tensor.raw_data = stored_values(tensor, folder).tobytes()
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return model, folder


class Graph:
    """A model to look things up in: types and shapes inferred, local functions inlined.

    An inferred size takes the place of a declared name, of outputs too. Nodes inside If, Loop and Scan are not seen.
    Raises IntegrityError if the graph is not valid ONNX.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        try:
            inlined = inliner.inline_local_functions(model) if model.functions else model
            graph = shape_inference.infer_shapes(inlined, data_prop=True).graph
        except (shape_inference.InferenceError, RuntimeError) as error:
            raise _unreadable(f"graph '{model.graph.name}'", str(error)) from error
        self.nodes = list(graph.node)
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value for value in graph.input if value.name not in self.initialisers]
        self.outputs = list(graph.output)
        self.types = {name: tensor.data_type for name, tensor in self.initialisers.items()}
        self.shapes: dict[str, tuple[Dim, ...]] = {name: tuple(t.dims) for name, t in self.initialisers.items()}
        for value in [*graph.value_info, *self.inputs, *self.outputs]:
            self.types[value.name] = value.type.tensor_type.elem_type
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                self.shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or UNKNOWN for dim in dims
                )
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            for position, name in enumerate(node.input):
                self.consumers[name].append((node, position))

    def of(self, *operators: str) -> Iterator[NodeProto]:
        """Nodes of these standard operators; a trailing ``*`` stands for any ending."""
        prefixes = tuple(name[:-1] for name in operators if name.endswith("*"))
        for node in self.nodes:
            if node.domain in STANDARD_DOMAINS and (node.op_type in operators or node.op_type.startswith(prefixes)):
                yield node

    def made_by(self, name: str, *operators: str) -> NodeProto | None:
        """The node that computes `name`, if it is one of these operators."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type in operators else None

    def is_constant(self, name: str) -> bool:
        return name in self.initialisers or self.made_by(name, "Constant") is not None

    def value(self, name: str) -> np.ndarray | None:
        """The value of an initialiser or Constant; None if it is computed, or too large to have been read."""
        if name in self.initialisers:
            tensor = self.initialisers[name]
            return None if is_external(tensor) else numpy_helper.to_array(tensor)
        node = self.made_by(name, "Constant")
        if node is None:
            return None
        content = helper.get_attribute_value(node.attribute[0])
        return numpy_helper.to_array(content) if isinstance(content, TensorProto) else np.asarray(content)

    def computed_from_constants(self, *, and_shapes: bool) -> set[str]:
        """Tensors that depend on initialisers alone; with `and_shapes`, on the shapes of other tensors too."""
        known = set(self.initialisers)
        sources = {"Constant", "Shape", "Size"} if and_shapes else {"Constant"}
        for node in self.nodes:
            if node.op_type in sources or (node.input and all(name in known or not name for name in node.input)):
                known.update(node.output)
        return known


def is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def stored_values(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The bytes of an external tensor, mapped from its file. IntegrityError if they are not there."""
    info = ExternalDataInfo(tensor)
    try:
        return np.memmap(
            folder / info.location, np.uint8, "r", info.offset or 0, (info.length or stored_bytes(tensor),)
        )
    except (OSError, ValueError) as error:
        raise IntegrityError(
            "weights_missing",
            f"the values of '{tensor.name}' are not in '{folder / info.location}'",
            str(error),
            "Export the stage again, or copy its weights file beside it.",
        ) from error


def _unreadable(subject: str, why: str) -> IntegrityError:
    return IntegrityError("graph_unreadable", f"{subject} is not valid ONNX", why, "Export the stage again.")


def input_name(node: NodeProto, position: int) -> str:
    """The name of an input, empty if it is left out."""
    return node.input[position] if position < len(node.input) else ""


def node_attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute, bytes as text; `default` if the node does not carry it."""
    value = next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)
    return value.decode() if isinstance(value, bytes) else value
