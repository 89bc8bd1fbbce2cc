"""FLOPs and parameters: single operators, the tiny encoder against a formula, the base encoder against a hand count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from onnx import parser

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.export.artifact import one_row
from fssdeploy.export.onnx import export_stage
from fssdeploy.export.profile import count_flops, parameters
from fssdeploy.systems import fsdino

SINGLE = [
    # (B, 5, 3) x (3, 7): 5 * 7 sums of 3 products
    ("MatMul", "float[batch,5,3] x, float[3,7] w", "float[batch,5,7] y", "y = MatMul(x, w)", 2 * 5 * 7 * 3),
    ("MatMul", "float[2,4,5,3] x, float[2,4,3,6] w", "float[2,4,5,6] y", "y = MatMul(x, w)", 2 * 8 * 5 * 6 * 3),
    ("MatMul", "float[9] x, float[9] w", "float y", "y = MatMul(x, w)", 2 * 9),
    ("Gemm", "float[batch,3] x, float[3,7] w, float[7] b", "float[batch,7] y", "y = Gemm(x, w, b)", 2 * 7 * 3),
    ("Gemm", "float[3,5] x, float[7,3] w", "float[5,7] y", "y = Gemm <transA = 1, transB = 1> (x, w)", 2 * 5 * 7 * 3),
    # 8x8 pixels, padding keeps the size, 3x3 window over 6 channels, or over 2 in each of 3 groups
    (
        "Conv",
        "float[batch,6,8,8] x, float[9,6,3,3] w",
        "float[batch,9,8,8] y",
        "y = Conv <pads = [1, 1, 1, 1]> (x, w)",
        2 * 64 * 9 * 6 * 9,
    ),
    (
        "Conv",
        "float[batch,6,8,8] x, float[9,2,3,3] w",
        "float[batch,9,8,8] y",
        "y = Conv <pads = [1, 1, 1, 1], group = 3> (x, w)",
        2 * 64 * 9 * 2 * 9,
    ),
    (
        "Conv",
        "float[batch,6,8,8] x, float[9,6,2,2] w",
        "float[batch,9,4,4] y",
        "y = Conv <strides = [2, 2]> (x, w)",
        2 * 16 * 9 * 6 * 4,
    ),
    # every one of 4x4 input pixels of 6 channels is spread over 2x2 pixels of 5 channels, or of 5 in each of 3 groups
    (
        "ConvTranspose",
        "float[batch,6,4,4] x, float[6,5,2,2] w",
        "float[batch,5,8,8] y",
        "y = ConvTranspose <strides = [2, 2]> (x, w)",
        2 * 16 * 6 * 5 * 4,
    ),
    (
        "ConvTranspose",
        "float[batch,6,4,4] x, float[6,5,2,2] w",
        "float[batch,15,8,8] y",
        "y = ConvTranspose <strides = [2, 2], group = 3> (x, w)",
        2 * 16 * 6 * 5 * 4,
    ),
    (
        "MultiHeadAttention",
        "float[batch,5,8] q, float[batch,7,8] k, float[batch,7,8] v",
        "float[batch,5,8] y",
        "y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)",
        4 * 5 * 7 * 8,
    ),
]


def graph_of(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>'
    return parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {body} }}")


@pytest.mark.parametrize(("operator", "inputs", "outputs", "body", "expected"), SINGLE)
def test_a_single_operator(operator: str, inputs: str, outputs: str, body: str, expected: int) -> None:
    graph = graph_of(inputs, outputs, body)
    assert count_flops(graph) == {operator: expected, "total": expected}
    assert count_flops(graph, batch=3)["total"] == (3 if "batch" in inputs else 1) * expected


def test_shapes_between_nodes_are_inferred_and_other_operators_cost_nothing() -> None:
    body = "a = Relu(x) t = Transpose <perm = [0, 2, 1]> (a) p = MatMul(a, t) s = Softmax(p) y = MatMul(s, a)"
    graph = graph_of("float[batch,5,3] x", "float[batch,5,3] y", body)
    assert count_flops(graph, batch=2) == {"MatMul": 2 * 2 * 2 * 5 * 5 * 3, "total": 2 * 2 * 2 * 5 * 5 * 3}
    assert count_flops(graph_of("float[batch,5] x", "float[batch,5] y", "y = Relu(x)")) == {"total": 0}


def test_a_graph_given_as_an_object_keeps_its_free_batch() -> None:
    graph = graph_of("float[batch,5] x", "float[batch,5] y", "y = Relu(x)")
    before = graph.SerializeToString()
    count_flops(graph, batch=4)
    assert graph.SerializeToString() == before


def test_names_that_the_exporter_gave_inner_dimensions_are_inferred_anew() -> None:
    graph = graph_of(
        "float[batch,5,3] x", "float[batch,5,5] y", "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul(x, t)"
    )
    graph.graph.value_info.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["s7", 3, "s8"]))
    graph.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "s8"
    assert count_flops(graph)["total"] == 2 * 5 * 5 * 3


def test_a_shape_that_cannot_be_inferred_is_an_error() -> None:
    graph = graph_of("float[batch,5] x", "float[batch,5] y", "a = com.microsoft.Unheard(x) y = MatMul(a, a)")
    with pytest.raises(InputError, match="the shape of 'a' cannot be inferred"):
        count_flops(graph)


def test_files_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    for function in (count_flops, parameters):
        with pytest.raises(InputError, match="does not exist"):
            function(tmp_path / "none.onnx")
        with pytest.raises(IntegrityError, match="not valid ONNX"):
            function(tmp_path / "bad.onnx")


def test_shapes_axes_and_scalars_are_no_parameters() -> None:
    constants = "<float[2,3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 2, 3}, float two = {2}, int64[2] s = {-1, 3}>"
    header = '<ir_version: 10, opset_import: ["" : 18]>'
    body = "a = Gemm(x, w, b) t = Mul(a, two) y = Reshape(t, s)"
    graph = parser.parse_model(f"{header} g (float[batch,2] x) => (float[batch,3] y) {constants} {{ {body} }}")
    assert parameters(graph) == 6 + 3


# --- FS-DINO's encoder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """FLOPs of the encoder stage by part."""

    patches: float
    blocks: float
    adapter: float


def encoder_flops(config: fsdino.FSDinoConfig) -> Cost:
    """From the sizes alone: a block has 12 C^2 weights for every token and 2 N^2 C multiply-adds of attention."""
    width, patch = config.encoder.dim, config.encoder.patch
    cells = config.grid**2
    tokens = cells + 1
    patches = cells * width * 3 * patch**2
    blocks = config.encoder.depth * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    middle, neck, ffn = config.adapter_middle, config.adapter_bottleneck, config.adapter_ffn
    convolutions = cells * (width * middle + 9 * middle**2 + middle * neck + neck * config.decoder_dim)
    attention = 2 * (cells * (4 * neck**2 + 2 * neck * ffn) + 2 * cells**2 * neck)
    return Cost(2 * patches, 2 * blocks, 2 * (convolutions + attention))


def export_encoder(preset: str, folder: Path, *, dynamic: bool) -> tuple[Path, Path, torch.nn.Module]:
    """The portable and the fused graph of a preset's encoder, and the stage they were exported from."""
    config = fsdino.PRESETS[preset]
    model = fsdino.build(config)
    fsdino.initialise_untrained(model, 0)  # or equal tensors (norms of ones, biases of zeros) are stored once
    stage = fsdino.stages(model)["encoder"]
    spec = fsdino.specs(config)["encoder"]
    files = export_stage(stage, spec if dynamic else one_row(spec), folder, precision="fp32", fuse=True)
    assert files.onnxruntime is not None
    return folder / files.portable, folder / files.onnxruntime, stage


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.nn.Module]:
    return export_encoder("tiny", tmp_path_factory.mktemp("tiny"), dynamic=True)


def test_the_tiny_encoder_costs_what_its_sizes_say(tiny: tuple[Path, Path, torch.nn.Module]) -> None:
    cost = encoder_flops(fsdino.PRESETS["tiny"])
    portable, fused, _ = tiny
    for batch in (1, 3):
        expected = batch * (cost.patches + cost.blocks + cost.adapter)
        assert count_flops(portable, batch)["total"] == expected
        assert count_flops(fused, batch)["total"] == expected


def test_the_fused_form_moves_the_attention_products_alone(tiny: tuple[Path, Path, torch.nn.Module]) -> None:
    portable, fused = count_flops(tiny[0]), count_flops(tiny[1])
    config = fsdino.PRESETS["tiny"]
    cells = config.grid**2
    attention = config.encoder.depth * 4 * (cells + 1) ** 2 * config.encoder.dim
    attention += 2 * 4 * cells**2 * config.adapter_bottleneck
    assert fused["MultiHeadAttention"] == attention
    assert portable["MatMul"] - fused["MatMul"] == attention
    assert portable["Conv"] == fused["Conv"]


def test_both_forms_hold_the_parameters_of_the_module(tiny: tuple[Path, Path, torch.nn.Module]) -> None:
    portable, fused, stage = tiny
    model = stage.model
    assert isinstance(model, fsdino.FSDino)
    used = sum(p.numel() for part in (model.encoder, model.adapter) for p in part.parameters())
    # The table of this grid stands for the stored one, its first row for the class token too; nothing reads the mask
    # token; mean and deviation of pictures are 3 numbers each.
    replaced = (model.encoder.pos_embed, model.encoder.cls_token, model.encoder.mask_token)
    table = model.encoder.position_table(model.config.grid, model.config.grid)
    assert parameters(portable) == used - sum(p.numel() for p in replaced) + table.numel() + 2 * 3
    assert parameters(fused) == parameters(portable)


@pytest.mark.slow
def test_the_base_encoder_costs_what_was_counted_by_hand(tmp_path: Path) -> None:
    """303.1 GFLOP for patches and blocks, 5.3 for the adapter (518 pixels, batch 1)."""
    cost = encoder_flops(fsdino.PRESETS["base"])
    assert (cost.patches + cost.blocks) / 1e9 == pytest.approx(303.1, abs=0.1)
    assert cost.adapter / 1e9 == pytest.approx(5.3, abs=0.1)
    portable, fused, _ = export_encoder("base", tmp_path, dynamic=False)
    for path in (portable, fused):
        assert count_flops(path)["total"] == cost.patches + cost.blocks + cost.adapter
        assert count_flops(path)["total"] / 1e9 == pytest.approx(303.1 + 5.3, abs=0.1)
