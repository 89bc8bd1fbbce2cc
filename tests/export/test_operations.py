"""Operations in ONNX graphs: nodes with bodies and the same written out, against float64 and against PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from fssdeploy.export.lint import lint
from fssdeploy.export.onnx import OPSET, OPSET_BF16, export_stage
from fssdeploy.export.operation_bodies import OPERATIONS
from fssdeploy.export.operations import inlined, with_functions
from fssdeploy.kernels.affinity import masked_max, masked_means, mutual_argmax, unit_rows
from fssdeploy.kernels.correlation import correlation_projection, hypercorrelation
from fssdeploy.kernels.scma import calibrated_attention
from fssdeploy.kernels.spectral import spectral_edges
from fssdeploy.modules.attention import multihead_attention
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from tests.operation_cases import CASES, Arrays, Case, compare

# The exporter on its own internals.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*The axis name")

FORMS = {"functions": with_functions, "inlined": inlined}


def run(model: onnx.ModelProto, arguments: dict[str, np.ndarray]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, arguments))


def with_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = version
    return model


def domains(model: onnx.ModelProto) -> set[str]:
    return {entry.domain for entry in model.opset_import} | {node.domain for node in model.graph.node}


def test_every_operation_has_a_case() -> None:
    assert {case.operation for case in CASES.values()} == set(OPERATIONS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_both_forms_compute_the_formula(case: Case, dtype: str, form: str) -> None:
    model = FORMS[form](case.model(dtype))
    onnx.checker.check_model(model)
    compare(run(model, case.arguments(dtype)), case.expected(dtype), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["masked_max-exclude1-k2", "spectral_edges-row-exp", "calibrated_attention-global"])
def test_the_newest_opset_of_the_exporter_is_as_good(name: str, form: str) -> None:
    assert OPSET < OPSET_BF16
    model = FORMS[form](with_opset(CASES[name].model("float32"), OPSET_BF16))
    compare(run(model, CASES[name].arguments("float32")), CASES[name].expected("float32"), "float32")


# One of each operation, and what another engine could read differently: infinities, ties and empty slices.
ELSEWHERE = [name for name in CASES if not name.startswith("spectral_edges") or name.endswith(("mean-clip", "row-exp"))]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_openvino_reads_what_is_written_out(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.read_model(inlined(CASES[name].model("float32")).SerializeToString())
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    found = core.compile_model(model, "CPU", settings)(CASES[name].arguments("float32"))
    compare(tuple(found.values()), CASES[name].expected("float32"), "float32")


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_serves_all_sizes(form: str) -> None:
    model = FORMS[form](CASES["masked_max-exclude1-k1"].model("float32"))
    for shots in (2, 5):
        case = CASES[f"masked_max-exclude1-k{shots}"]
        compare(run(model, case.arguments("float32")), case.expected("float32"), "float32")


def two_masked_maxima(first: int, second: int) -> onnx.ModelProto:
    """Both maxima of the same inputs; outputs are the values of each."""
    model = CASES["masked_max-exclude0-k1"].model("float32")
    node = model.graph.node[0]
    values = model.graph.output[0]
    del model.graph.node[:], model.graph.output[:]
    for number, exclude in enumerate((first, second)):
        output = f"values{number}"
        model.graph.node.append(
            helper.make_node("MaskedMax", node.input, [output, ""], domain="fssdeploy", exclude=exclude)
        )
        model.graph.output.append(helper.make_tensor_value_info(output, values.type.tensor_type.elem_type, None))
        model.graph.output[-1].type.tensor_type.shape.CopyFrom(values.type.tensor_type.shape)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_variants_of_an_operation_are_told_apart(form: str) -> None:
    cases = [CASES[f"masked_max-exclude{exclude}-k1"] for exclude in (0, 1)]
    model = FORMS[form](two_masked_maxima(0, 1))
    found = run(model, cases[0].arguments("float32"))
    compare(found, tuple(case.expected("float32")[0] for case in cases), "float32")
    assert (found[0] != found[1]).any()


def test_only_the_second_variant_is_an_overload() -> None:
    different, equal = with_functions(two_masked_maxima(0, 1)), with_functions(two_masked_maxima(1, 1))
    assert [node.overload for node in different.graph.node] == ["", "1"]
    assert [function.overload for function in different.functions] == ["", "1"]
    assert different.ir_version >= 10
    assert [function.overload for function in equal.functions] == [""]
    assert equal.ir_version == 9


def test_bodies_read_the_attributes_of_their_node() -> None:
    """One body for two nodes with different numbers."""
    case = CASES["calibrated_attention-row"]
    model = case.model("float32")
    weak = onnx.NodeProto()
    weak.CopyFrom(model.graph.node[0])
    weak.name = weak.output[0] = "weak"
    next(attribute for attribute in weak.attribute if attribute.name == "strength").f = 1.5
    model.graph.node.append(weak)
    model.graph.output.append(helper.make_tensor_value_info("weak", onnx.TensorProto.FLOAT, [None] * 3))
    model = with_functions(model)
    assert len(model.functions) == 1
    exact = (array.astype(np.float64) for array in case.inputs)
    expected = (*case.expected("float32"), *case.compute(*exact, **{**case.attributes, "strength": 1.5}))
    compare(run(model, case.arguments("float32")), expected, "float32")


def test_written_out_graphs_are_standard_and_float32_ones_without_casts() -> None:
    for case in CASES.values():
        model = inlined(case.model("float32"))
        assert domains(model) == {""}
        assert not model.functions
        casts = [node for node in model.graph.node if node.op_type in ("Cast", "CastLike")]
        # What promises float16, and what gives a graph output its name.
        assert len(casts) <= len(case.outputs), case.operation
        names = [name for node in model.graph.node for name in node.output]
        assert len(names) == len(set(names))


def test_other_nodes_stay_and_models_without_operations_are_left_alone() -> None:
    model = two_masked_maxima(0, 1)
    model.graph.node.append(helper.make_node("Attention", ["values0"] * 3, ["attended"], domain="fssdeploy"))
    written = inlined(model)
    assert [node.op_type for node in written.graph.node if node.domain] == ["Attention"]
    assert domains(written) == {"", "fssdeploy"}
    plain = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "plain", [], []))
    assert inlined(plain) == plain
    assert with_functions(plain) == plain


INPUTS = ["query", "support", "masks", "cells", "labels"]


class EveryOperation(torch.nn.Module):
    """Calls each operation with what a few-shot system would pass; sizes of query and support are free."""

    def forward(
        self, query: torch.Tensor, support: torch.Tensor, masks: torch.Tensor, cells: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows, shots = unit_rows(query, half=False), unit_rows(support, half=False)
        best, place = masked_max(rows, shots, masks)
        hard, hard_place = masked_max(rows, shots, masks, "exclude")
        regions = unit_rows(cells[:3], half=False)
        attended = calibrated_attention(query[None], support[0][None], support[0][None] * 2, masks[0, :1, 1:], 1)
        return (
            unit_rows(query),
            masked_means(rows, shots, masks),
            best, place, hard, hard_place,
            *mutual_argmax(rows, shots),
            hypercorrelation(query[None], support[:1], masks[0, 0]),
            correlation_projection(query, support, masks.mT),
            *spectral_edges(unit_rows(cells, half=False), labels, regions @ regions.T, cells[:, 0], 5, 4, 1.5, "mean"),
            attended,
            calibrated_attention(attended, support[1][None], support[1][None], masks[1, :1], 0, 5.0, "global", 0.3),
        )  # fmt: skip


@pytest.fixture(scope="module")
def traced() -> tuple[onnx.ModelProto, EveryOperation]:
    network = EveryOperation().eval()
    axes = {"queries": 7, "cells_of_support": 11, "shots": 3}
    queries, columns, shots = (torch.export.Dim(name, min=2, max=64) for name in axes)
    program = torch.onnx.export(
        network,
        inputs(torch.float32, *axes.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=INPUTS,
        dynamic_shapes=({0: queries}, {0: shots, 1: columns}, {0: shots, 2: columns}, None, None),
        verbose=False,
    )
    assert program is not None
    return program.model_proto, network


def inputs(dtype: torch.dtype, queries: int, columns: int, shots: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    query, support, cells = (
        torch.randn(*shape, 8, generator=generator) for shape in ((queries,), (shots, columns), (20,))
    )
    masks = torch.rand(shots, 2, columns, generator=generator)
    masks[masks < 0.4] = 0
    masks[-1, -1] = 0
    floats = (tensor.to(dtype) for tensor in (query, support, masks, 0.3 * cells))
    return *floats, torch.arange(20) % 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(13, 17, 2), (5, 3, 5)])
def test_a_traced_network_computes_what_it_did(
    traced: tuple[onnx.ModelProto, EveryOperation], form: str, sizes: tuple[int, int, int]
) -> None:
    model, network = traced
    arguments = inputs(torch.float32, *sizes)
    found = run(FORMS[form](model), dict(zip(INPUTS, map(np.asarray, arguments), strict=True)))
    expected = network(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments))
    compare(found, tuple(tensor.numpy() for tensor in expected), "float32")


def test_a_traced_network_keeps_one_node_an_operation(traced: tuple[onnx.ModelProto, EveryOperation]) -> None:
    model = with_functions(traced[0])
    found = [node.op_type for node in model.graph.node if node.domain == "fssdeploy"]
    assert set(found) == set(OPERATIONS)
    assert found.count("CalibratedAttention") == found.count("MaskedMax") == 2
    assert len(model.functions) == len(OPERATIONS) + 3  # two spans, two modes, half or not


class Match(torch.nn.Module):
    """A stage with opaque attention before an operation, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = multihead_attention(tokens, tokens, self.project(tokens), 2)
        means = calibrated_attention(tokens, tokens, tokens, tokens[:, :4, 0].sigmoid(), 2)
        return means + tokens


@pytest.mark.parametrize("operation_nodes", [False, True])
def test_a_stage_exports_with_attention_and_operations(tmp_path: Path, operation_nodes: bool) -> None:
    spec = StageSpec(
        "match",
        (TensorSpec("tokens", "float32", (BATCH, 9, 16)),),
        (TensorSpec("matched", "float32", (BATCH, 9, 16)),),
    )
    stage = Match().eval()
    files = export_stage(stage, spec, tmp_path, precision="fp32", fuse=True, operation_nodes=operation_nodes)
    assert files.onnxruntime
    tokens = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1))
    for file, fused in ((files.portable, set()), (files.onnxruntime, {"com.microsoft"})):
        path = tmp_path / file
        found = {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node if node.domain}
        kept = {"CalibratedAttention"} if operation_nodes else set()
        assert found == kept | ({"MultiHeadAttention"} if fused else set())
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        compare((session.run(None, {"tokens": tokens.numpy()})[0],), (stage(tokens).detach().numpy(),), "float32")
        if not operation_nodes:
            assert lint(path, spec, allowed_domains=frozenset(fused)) == []
