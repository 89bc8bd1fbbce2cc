"""What breaks TensorRT or ONNX Runtime downstream, found in the graph before an artifact is promoted.

Every rule is one function; its docstring is the reason and the remedy, and ends every message of the rule. The limits
are those of TensorRT's parser 10.x and of ONNX Runtime: docs/export.md.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from fssdeploy.export.graph import (
    STANDARD_DOMAINS,
    UNKNOWN,
    Dim,
    Graph,
    input_name,
    is_external,
    node_attribute,
    read_model,
    stored_bytes,
    stored_values,
)
from fssdeploy.protocol import StageSpec, TensorSpec

LARGE_TENSOR = 64 << 20  # bytes: above this a second copy is worth an error
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATING = (TensorProto.FLOAT, TensorProto.DOUBLE, *HALF)

# What stays of an absolute path in text: at its start or after a separator, at least two names deep; or a drive letter.
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'(=,;:])(?:/[\w.+@~-]+){2,}|\b[A-Za-z]:\\""")

Trip = tuple[str, str]  # node or tensor, and what is wrong with it


@dataclass(frozen=True)
class Finding:
    """One broken rule. An error blocks a promotion; a warning costs speed or accuracy.

    `rule` is a stable name for programs, `node` the node or tensor, `message` one line: what, why, what to do.
    """

    severity: str
    rule: str
    node: str
    message: str


def lint(
    path_or_model: Path | onnx.ModelProto,
    spec: StageSpec,
    *,
    target_opset: int = 20,
    precision: str = "fp32",
    allowed_domains: frozenset[str] = frozenset(),
) -> list[Finding]:
    """Check one exported stage against its spec and against what the engines accept; errors come first.

    `target_opset` is the newest opset the target's parser reads (TensorRT 10.0: 20, 11: 25). `precision` is assumed for
    tensors whose type cannot be inferred. `allowed_domains` are those of a file made for one runtime ("com.microsoft").
    Weights stay on disk, except where initialisers larger than 64 MiB have the same size.
    Raises InputError if there is no such file, IntegrityError if it is not ONNX or its weights are missing.
    """
    model, folder = read_model(path_or_model)
    stage = Stage(Graph(model), folder, spec, target_opset, precision, allowed_domains)
    findings = [
        Finding(rule.severity, rule.name, where, f"{what}. {rule.reason}")
        for rule in RULES
        for where, what in rule.check(stage)
    ]
    return sorted(findings, key=lambda finding: finding.severity != "error")


@dataclass(frozen=True)
class Stage:
    """What a rule may look at; the fields are the arguments of `lint`."""

    graph: Graph
    folder: Path | None
    spec: StageSpec
    target_opset: int
    precision: str
    allowed_domains: frozenset[str]

    def is_half(self, name: str) -> bool:
        known = self.graph.types.get(name, TensorProto.UNDEFINED)
        return known in HALF if known else self.precision != "fp32"

    def borders(self) -> list[tuple[str, tuple[Dim, ...] | None, TensorSpec]]:
        """Name, shape in the file and spec of every graph input and output that the spec names."""
        specs = {tensor.name: tensor for tensor in (*self.spec.inputs, *self.spec.outputs)}
        names = [value.name for value in (*self.graph.inputs, *self.graph.outputs)]
        return [(name, self.graph.shapes.get(name), specs[name]) for name in names if name in specs]


def _label(node: NodeProto) -> str:
    return node.name or node.output[0]


# --- rules -------------------------------------------------------------------------------------------------------


Check = Callable[[Stage], Iterable[Trip]]


@dataclass(frozen=True)
class Rule:
    severity: str
    name: str
    check: Check

    @property
    def reason(self) -> str:
        """Why the rule stands and what to do, on one line."""
        return " ".join((inspect.getdoc(self.check) or "").split())


RULES: list[Rule] = []


def rule(severity: str, name: str) -> Callable[[Check], Check]:
    """Register a function that yields (node or tensor, what is wrong) for every place that breaks its rule."""

    def register(check: Check) -> Check:
        RULES.append(Rule(severity, name, check))
        return check

    return register


def _each(nodes: Iterable[NodeProto], what: str = "is in the graph") -> Iterator[Trip]:
    for node in nodes:
        yield _label(node), f"{node.op_type} {what}"


def _together(names: Iterable[str], what: str) -> Iterator[Trip]:
    """One finding for many tensors or nodes of the same fault: the first is named, the others counted."""
    found = list(names)
    if found:
        yield found[0], f"{what}: '{found[0]}'" + (f" and {len(found) - 1} more" if len(found) > 1 else "")


@rule("error", "io-names")
def io_names(stage: Stage) -> Iterator[Trip]:
    """Engines bind tensors by name, and default names change between exporters. Pass the spec's names to the export."""
    for kind, values, specs in (
        ("input", stage.graph.inputs, stage.spec.inputs),
        ("output", stage.graph.outputs, stage.spec.outputs),
    ):
        have, want = {value.name for value in values}, {tensor.name for tensor in specs}
        for name in sorted(want - have):
            yield name, f"{kind} '{name}' of the spec is not in the graph"
        for name in sorted(have - want):
            yield name, f"{kind} '{name}' of the graph is not in the spec"


@rule("error", "io-dtype")
def io_dtype(stage: Stage) -> Iterator[Trip]:
    """The dtypes at the borders are a contract, the same at every precision. Cast inside the stage, at its borders."""
    for name, _, spec in stage.borders():
        have = stage.graph.types[name]
        text = str(helper.tensor_dtype_to_np_dtype(have)) if have else "not a tensor"
        if text != spec.dtype:
            yield name, f"'{name}' is {text} and declared {spec.dtype}"


@rule("error", "io-shape")
def io_shape(stage: Stage) -> Iterator[Trip]:
    """Profiles and server configurations are derived from the spec. Make the spec and the module agree."""
    for name, shape, spec in stage.borders():
        pairs = zip(shape or (), spec.shape, strict=False)
        wrong = any(isinstance(have, int) and isinstance(want, int) and have != want for have, want in pairs)
        if shape is None or len(shape) != len(spec.shape) or wrong:
            yield (
                name,
                f"'{name}' has shape {'unknown' if shape is None else shape} and is declared {spec.shape_text()}",
            )


@rule("error", "int64-io")
def int64_io(stage: Stage) -> Iterator[Trip]:
    """TensorRT 9 and later then needs slow int64 bindings. Use int32 at the borders."""
    for value in (*stage.graph.inputs, *stage.graph.outputs):
        if stage.graph.types[value.name] == TensorProto.INT64:
            yield value.name, f"'{value.name}' is int64"


def _is_picture_side(shape: tuple[Dim, ...], position: int) -> bool:
    return len(shape) == 4 and position >= 2


@rule("error", "dynamic-dim")
def dynamic_dim(stage: Stage) -> Iterator[Trip]:
    """Only dimensions that the spec names may vary, under that name: profiles cover no others. Export a number."""
    for name, shape, spec in stage.borders():
        for position, (have, want) in enumerate(zip(shape or (), spec.shape, strict=False)):
            if isinstance(have, str) and have != want and not _is_picture_side(shape or (), position):
                yield name, f"dimension {position} of '{name}' is '{have}' and declared {want}"


@rule("error", "symbolic-size")
def symbolic_size(stage: Stage) -> Iterator[Trip]:
    """Height and width must be numbers: tables are baked in, one artifact for each grid. Export fixed sizes."""
    for value in (*stage.graph.inputs, *stage.graph.outputs):
        shape = stage.graph.shapes.get(value.name, ())
        sides = [
            dim for position, dim in enumerate(shape) if _is_picture_side(shape, position) and isinstance(dim, str)
        ]
        if sides:
            yield value.name, f"'{value.name}' has symbolic sides {', '.join(map(str, sides))}"


@rule("error", "silent-specialisation")
def silent_specialisation(stage: Stage) -> Iterator[Trip]:
    """The trace fixed a size that the graph still declares free: any other size fails at run time. Trace with a batch
    of 2 and keep Python numbers out of forward.
    """
    graph = stage.graph

    def symbols(values: Iterable[onnx.ValueInfoProto]) -> list[Dim]:
        return [dim for value in values for dim in graph.shapes.get(value.name, ()) if isinstance(dim, str)]

    free = symbols(graph.inputs)
    if free and graph.outputs and not symbols(graph.outputs):
        yield graph.outputs[0].name, f"the inputs have the free dimension '{free[0]}' and every output is fixed"
        return
    bound: dict[str, dict[Dim, str]] = defaultdict(dict)
    for name, shape, spec in stage.borders():
        for have, want in zip(shape or (), spec.shape, strict=False):
            if isinstance(want, str):
                bound[want].setdefault(have, name)
    for dim, places in bound.items():
        if len(places) > 1:
            listed = ", ".join(f"{have} in '{name}'" for have, name in places.items())
            yield list(places.values())[-1], f"dimension '{dim}' is {listed}"


@rule("error", "opset")
def opset(stage: Stage) -> Iterator[Trip]:
    """The target's parser refuses newer opsets. Export with an older opset_version, or name a newer target."""
    for entry in stage.graph.model.opset_import:
        if entry.domain in STANDARD_DOMAINS and entry.version > stage.target_opset:
            yield "graph", f"the graph has opset {entry.version}, the target reads up to {stage.target_opset}"


@rule("error", "undeclared-domain")
def undeclared_domain(stage: Stage) -> Iterator[Trip]:
    """Engines look an unknown operator up as a plugin and fail. Write it in standard operators, or declare the file as
    made for the one runtime that has it.
    """
    model = stage.graph.model
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        if node.domain not in STANDARD_DOMAINS | stage.allowed_domains:
            found[node.domain, node.op_type].append(_label(node))
    for (domain, operator), labels in found.items():
        yield from _together(labels, f"operator {domain}::{operator} is of an undeclared domain")


@rule("error", "control-flow")
def control_flow(stage: Stage) -> Iterator[Trip]:
    """Every branch and iteration costs fusion. Unroll it, or move it to glue; what is inside is not checked."""
    yield from _each(stage.graph.of("If", "Loop", "Scan"))


@rule("error", "data-dependent-shape")
def data_dependent_shape(stage: Stage) -> Iterator[Trip]:
    """The shape of its output depends on values, so that nothing after it has a known shape. Move it to glue."""
    operators = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "Optional*", "Sequence*")
    yield from _each(stage.graph.of(*operators, "SplitToSequence", "ConcatFromSequence"))


@rule("error", "unsupported-operator")
def unsupported_operator(stage: Stage) -> Iterator[Trip]:
    """TensorRT 10 has no such layer. Write it in other operators; int8 goes by QuantizeLinear and DequantizeLinear."""
    integer = ("QLinear*", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
    yield from _each(stage.graph.of("DFT", "STFT", "Det", "BitShift", "Bitwise*", *integer))


@rule("error", "unsupported-type")
def unsupported_type(stage: Stage) -> Iterator[Trip]:
    """TensorRT knows neither complex numbers nor text. Keep real and imaginary parts apart; keep text in glue."""
    types = (TensorProto.COMPLEX64, TensorProto.COMPLEX128, TensorProto.STRING)
    yield from _together((n for n, t in stage.graph.types.items() if t in types), "there are complex or text tensors")


@rule("error", "double-tensor")
def double_tensor(stage: Stage) -> Iterator[Trip]:
    """TensorRT clamps double to float without a word, so that engines differ. Compute in float32."""
    names = (name for name, kind in stage.graph.types.items() if kind == TensorProto.DOUBLE)
    yield from _together(names, "there are float64 tensors")


@rule("error", "random-operator")
def random_operator(stage: Stage) -> Iterator[Trip]:
    """The same picture must give the same mask every time. Call eval() before the export; pass noise as an input."""
    graph = stage.graph
    yield from _each(graph.of("RandomNormal*", "RandomUniform*", "Multinomial", "Bernoulli"))
    for node in graph.of("Dropout"):
        training = input_name(node, 2)
        if training:
            value = graph.value(training)
            if value is None or value.any():
                yield _label(node), "Dropout is in training mode"


@rule("error", "resize-antialias")
def resize_antialias(stage: Stage) -> Iterator[Trip]:
    """TensorRT does not antialias. Bake the resampled table into the stage as a buffer."""
    yield from _each((node for node in stage.graph.of("Resize") if node_attribute(node, "antialias", 0)), "antialiases")


@rule("warning", "resize-cubic")
def resize_cubic(stage: Stage) -> Iterator[Trip]:
    """TensorRT does not promise cubic resizing. Bake the resampled table into the stage as a buffer."""
    for node in stage.graph.of("Resize"):
        if node_attribute(node, "mode", "nearest") == "cubic" and not node_attribute(node, "antialias", 0):
            yield _label(node), "Resize is cubic"


@rule("error", "resize-coordinates")
def resize_coordinates(stage: Stage) -> Iterator[Trip]:
    """TensorRT has half_pixel, pytorch_half_pixel, asymmetric and align_corners. Use one of them."""
    listed = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    for node in stage.graph.of("Resize"):
        mode = node_attribute(node, "coordinate_transformation_mode", "half_pixel")
        if node_attribute(node, "mode", "nearest") == "linear" and mode not in listed:
            yield _label(node), f"linear Resize has coordinates {mode}"


@rule("error", "resize-size")
def resize_size(stage: Stage) -> Iterator[Trip]:
    """The size must be known when an engine is built, or follow from shapes where the batch is free. Give a number."""
    known = stage.graph.computed_from_constants(and_shapes=True) | {""}
    for node in stage.graph.of("Resize"):
        if not {input_name(node, 2), input_name(node, 3)} <= known:
            yield _label(node), "the size of Resize is computed from data"


@rule("error", "einsum-restricted")
def einsum_restricted(stage: Stage) -> Iterator[Trip]:
    """TensorRT takes neither an ellipsis nor an index twice in one operand. Write MatMul."""
    for node in stage.graph.of("Einsum"):
        if _is_restricted(node):
            yield _label(node), f"Einsum '{node_attribute(node, 'equation', '')}'"


@rule("warning", "einsum")
def einsum(stage: Stage) -> Iterator[Trip]:
    """Engines support few forms of it and fuse none. Write MatMul."""
    for node in stage.graph.of("Einsum"):
        if not _is_restricted(node):
            yield _label(node), f"Einsum '{node_attribute(node, 'equation', '')}'"


def _is_restricted(node: NodeProto) -> bool:
    terms = node_attribute(node, "equation", "").replace(" ", "").split("->")[0].split(",")
    return any(len(set(term)) < len(term) for term in terms)  # an ellipsis is a dot three times


@rule("error", "topk")
def topk(stage: Stage) -> Iterator[Trip]:
    """TensorRT needs a constant K below 3840 and sorts always. Choose in glue otherwise."""
    for node in stage.graph.of("TopK"):
        count = stage.graph.value(input_name(node, 1))
        if not stage.graph.is_constant(input_name(node, 1)):
            yield _label(node), "K of TopK is computed"
        elif count is not None and count.max() >= 3840:
            yield _label(node), f"K of TopK is {count.max()}"
        if not node_attribute(node, "sorted", 1):
            yield _label(node), "TopK asks for no order"


@rule("error", "computed-axes")
def computed_axes(stage: Stage) -> Iterator[Trip]:
    """TensorRT needs axes as initialisers. Give them as Python numbers in forward."""
    positions = {"Squeeze": 1, "Unsqueeze": 1, "Slice": 3, "Pad": 3, "CumSum": 1}
    for node in stage.graph.of(*positions, "Reduce*"):
        axes = input_name(node, positions.get(node.op_type, 1))
        if axes and not stage.graph.is_constant(axes):
            yield _label(node), f"the axes of {node.op_type} are computed"


@rule("error", "scatter-reduction")
def scatter_reduction(stage: Stage) -> Iterator[Trip]:
    """TensorRT only overwrites in ScatterND. Write a one-hot matrix and MatMul, or move it to glue."""
    for node in stage.graph.of("ScatterND"):
        if node_attribute(node, "reduction", "none") != "none":
            yield _label(node), f"ScatterND reduces by {node_attribute(node, 'reduction', 'none')}"


@rule("error", "size-at-build")
def size_at_build(stage: Stage) -> Iterator[Trip]:
    """TensorRT must know the size of EyeLike, Hardmax and OneHot when it builds. Give a number."""
    graph = stage.graph
    for node in graph.of("OneHot"):
        if not graph.is_constant(input_name(node, 1)):
            yield _label(node), "the depth of OneHot is computed"
    for node in graph.of("EyeLike", "Hardmax"):
        shape = graph.shapes.get(node.input[0], (UNKNOWN,))
        sizes = shape if node.op_type == "EyeLike" else (shape[node_attribute(node, "axis", -1)],)
        if not all(isinstance(dim, int) for dim in sizes):
            yield _label(node), f"the size of {node.op_type} is not fixed"


# Inputs that say where or how large, not what.
INDEX_INPUTS = {
    "Gather": (1,),
    "GatherElements": (1,),
    "GatherND": (1,),
    "ScatterElements": (1,),
    "ScatterND": (1,),
    "Slice": (1, 2, 3, 4),
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Resize": (3,),
    "Pad": (1, 3),
    "Split": (1,),
    "ConstantOfShape": (0,),
}


@rule("warning", "int64-arithmetic")
def int64_arithmetic(stage: Stage) -> Iterator[Trip]:
    """TensorRT keeps int64 and is slow on it. Use int32; only shapes and indices may stay int64."""
    graph = stage.graph
    outputs = {value.name for value in graph.outputs}
    shapes = graph.computed_from_constants(and_shapes=True)
    indices: set[str] = set()
    for node in reversed(graph.nodes):
        for name in node.output:
            uses = graph.consumers[name]
            if name not in outputs and all(
                position in INDEX_INPUTS.get(user.op_type, ()) or indices.issuperset(user.output)
                for user, position in uses
            ):
                indices.add(name)
    arithmetic = ("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Neg", "Abs", "Min", "Max", "Sum", "Clip", "MatMul", "Gemm")
    for node in graph.of(*arithmetic, "CumSum", "Reduce*"):
        if graph.types.get(node.input[0]) == TensorProto.INT64 and node.output[0] not in shapes | indices:
            yield _label(node), f"{node.op_type} computes in int64"


@rule("warning", "safe-softmax")
def safe_softmax(stage: Stage) -> Iterator[Trip]:
    """The exporter's attention guards rows without a key, which no stage has. Use fssdeploy.modules.attention."""
    graph = stage.graph
    for node in graph.of("IsNaN"):
        guarded = any(user.op_type == "Where" for user, _ in graph.consumers[node.output[0]])
        if guarded and graph.made_by(node.input[0], "Softmax"):
            yield _label(node), "Softmax is followed by IsNaN and Where"


@rule("warning", "wide-softmax")
def wide_softmax(stage: Stage) -> Iterator[Trip]:
    """In half precision the sum over more than 8192 columns loses accuracy or overflows. Compute it in float32."""
    for node in stage.graph.of("Softmax", "LogSoftmax"):
        shape = stage.graph.shapes.get(node.input[0])
        columns = shape[node_attribute(node, "axis", -1)] if shape else UNKNOWN
        if isinstance(columns, int) and columns > 8192 and stage.is_half(node.input[0]):
            yield _label(node), f"Softmax runs over {columns} columns in half precision"


@rule("warning", "broken-layer-norm")
def broken_layer_norm(stage: Stage) -> Iterator[Trip]:
    """In half precision the squares overflow. Use layer_norm, which stays one node, on channels permuted to the end."""
    graph = stage.graph
    for node in graph.of("Sqrt"):
        total = graph.made_by(node.input[0], "Add")
        for name in total.input if total else node.input:
            mean = graph.made_by(name, "ReduceMean")
            if mean and graph.made_by(mean.input[0], "Pow", "Mul") and stage.is_half(mean.input[0]):
                yield _label(node), "a norm is written out in ReduceMean, Pow and Sqrt"


@rule("warning", "inner-cast")
def inner_cast(stage: Stage) -> Iterator[Trip]:
    """Precision leaks where types change in the middle. Cast at the borders only, unless float32 is wanted here."""
    graph = stage.graph
    inputs, outputs = ({value.name for value in values} for values in (graph.inputs, graph.outputs))
    for node in graph.of("Cast"):
        source = graph.types.get(node.input[0])
        # Casts of integers and truth values are indices and masks, not precision.
        if (not source or source in FLOATING) and node.input[0] not in inputs and node.output[0] not in outputs:
            yield _label(node), f"'{node.input[0]}' is cast inside the graph"


@rule("warning", "constant-subgraph")
def constant_subgraph(stage: Stage) -> Iterator[Trip]:
    """The exporter folds only small tables, and an engine that does not fold computes it again for every picture.
    Compute it when the stage is built and keep it as a buffer.
    """
    graph = stage.graph
    outputs = {value.name for value in graph.outputs}
    known = graph.computed_from_constants(and_shapes=False)
    # int8 weights are stored quantised on purpose: engines fold DequantizeLinear into the product behind it.
    kept = ("Constant", "QuantizeLinear", "DequantizeLinear")
    for node in graph.nodes:
        if node.op_type in kept or not known.issuperset(node.output):
            continue
        if outputs.intersection(node.output) or any(
            not known.issuperset(user.output) for name in node.output for user, _ in graph.consumers[name]
        ):
            yield _label(node), f"{node.op_type} depends on initialisers alone"


@rule("error", "duplicated-initialiser")
def duplicated_initialiser(stage: Stage) -> Iterator[Trip]:
    """Tied weights were exported twice, and every engine holds both. Let both nodes read one initialiser."""
    by_size: dict[int, list[TensorProto]] = defaultdict(list)
    for tensor in stage.graph.initialisers.values():
        if stored_bytes(tensor) > LARGE_TENSOR:
            by_size[stored_bytes(tensor)].append(tensor)
    for size, tensors in by_size.items():
        copies: dict[object, list[str]] = defaultdict(list)
        for tensor in tensors if len(tensors) > 1 else ():
            copies[_identity(tensor, stage.folder)].append(tensor.name)
        for names in copies.values():
            if len(names) > 1:
                yield names[1], f"{' and '.join(map(repr, names))} hold the same {size >> 20} MiB"


def _identity(tensor: TensorProto, folder: Path | None) -> object:
    """The digest of a tensor's bytes; where they cannot be read, their place."""
    if not is_external(tensor):
        return hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).digest()
    if folder is None:
        info = ExternalDataInfo(tensor)
        return info.location, info.offset, info.length
    return hashlib.sha256(stored_values(tensor, folder).data).digest()


@rule("error", "source-path")
def source_path(stage: Stage) -> Iterator[Trip]:
    """An artifact must not tell where and from which sources it was made. Strip it (strip_provenance in
    fssdeploy.export.onnx) and name weights relative to the graph.
    """
    model = stage.graph.model
    holders: list[Any] = [model, model.graph, *model.functions, *model.graph.node]
    holders += [node for function in model.functions for node in function.node]
    holders += [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]
    found = (_name(holder) for holder in holders if any(map(_tells_source, _texts(holder))))
    yield from _together(found, "paths or stack traces of the exporting machine are in the file")


def _name(holder: Any) -> str:
    return _label(holder) if isinstance(holder, NodeProto) else getattr(holder, "name", "") or "model"


def _texts(holder: Any) -> Iterator[str]:
    yield holder.doc_string
    for entry in holder.metadata_props:
        yield from (entry.key, entry.value)
    if isinstance(holder, TensorProto):
        yield from (entry.value for entry in holder.external_data if entry.key == "location")


def _tells_source(text: str) -> bool:
    return text.startswith("pkg.torch.") or ABSOLUTE_PATH.search(text) is not None
