"""An artifact that is made in milliseconds: it finds what is about as bright as the marked object was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fssdeploy.artifact import FORMAT, MANIFEST, digest, file_sha256
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec

CANVAS, PATCH = 28, 7
FINGERPRINT = "f" * 64


def grey_specs(batch: int | str = BATCH) -> dict[str, StageSpec]:
    """The contracts of the three stages, with a free batch or one of `batch` rows."""
    picture = TensorSpec("picture", "uint8", (batch, 3, CANVAS, CANVAS))
    grey = TensorSpec("grey", "float32", (batch, CANVAS, CANVAS))
    mask = TensorSpec("mask", "float32", (batch, 1, CANVAS, CANVAS))
    level = TensorSpec("level", "float32", (batch, 1, 1))
    logits = TensorSpec("mask_logits", "float32", (batch, 1, CANVAS, CANVAS))
    return {
        "encoder": StageSpec("encoder", (picture,), (grey,)),
        "enroll": StageSpec("enroll", (grey, mask), (level,)),
        "segment": StageSpec("segment", (grey, level), (logits, TensorSpec("prior_logits", "float32", logits.shape))),
    }


def write_artifact(
    folder: Path, batch: int | str = BATCH, *, width: float = 30.0, fingerprint: str = FINGERPRINT
) -> Path:
    """Write the artifact. `width`, the levels that still count as alike, is a weight of the last stage."""
    folder.mkdir(parents=True)
    specs = grey_specs(batch)
    node, constant = helper.make_node, _constant
    graphs = {
        "encoder": (
            [
                node("Cast", ["picture"], ["levels"], to=TensorProto.FLOAT),
                node("ReduceMean", ["levels", "channel"], ["mean"], keepdims=0),
                node("MatMul", ["mean", "identity"], ["grey"]),
            ],
            [constant("channel", np.array([1])), constant("identity", np.eye(CANVAS, dtype=np.float32))],
        ),
        "enroll": (
            [
                node("Squeeze", ["mask", "channel"], ["weight"]),
                node("Mul", ["grey", "weight"], ["inside"]),
                node("Mul", ["inside", "ones"], ["weighted"]),
                node("ReduceSum", ["weighted", "area"], ["total"]),
                node("ReduceSum", ["weight", "area"], ["count"]),
                node("Div", ["total", "count"], ["level"]),
            ],
            [
                constant("channel", np.array([1])),
                constant("area", np.array([1, 2])),
                constant("ones", np.ones((CANVAS, CANVAS), np.float32)),
            ],
        ),
        "segment": (
            [
                node("Sub", ["grey", "level"], ["apart"]),
                node("Abs", ["apart"], ["distance"]),
                node("Sub", ["width", "distance"], ["alike"]),
                node("Unsqueeze", ["alike", "channel"], ["mask_logits"]),
                node("Neg", ["mask_logits"], ["prior_logits"]),
            ],
            [
                constant("channel", np.array([1])),
                constant("width", np.full((CANVAS, CANVAS), width, np.float32)),
            ],
        ),
    }
    for stage, (nodes, constants) in graphs.items():
        spec = specs[stage]
        graph = helper.make_graph(nodes, stage, _infos(spec.inputs), _infos(spec.outputs), constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        file = folder / f"{stage}.onnx"
        onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=100)
    (folder / "parity.json").write_text("{}")
    manifest = {
        "format": FORMAT,
        "system": "grey",
        "preset": "test",
        "precision": "fp32",
        "weights": {"status": "trained"},
        "fingerprint": fingerprint,
        "preprocessing": {"canvas": CANVAS, "patch": PATCH, "geometry": "letterbox"},
        "stages": {
            stage: {
                "spec": spec.to_dict(),
                "files": {"portable": f"{stage}.onnx", "weights": f"{stage}.onnx.data"},
            }
            for stage, spec in specs.items()
        },
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(folder.iterdir())
        },
    }
    manifest = json.loads(json.dumps(manifest))
    (folder / MANIFEST).write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    return folder


def bright(height: int, width: int, level: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with a bright object in its upper left quarter, and the mask of that."""
    mask = np.zeros((height, width), bool)
    mask[: height // 2, : width // 2] = True
    noise = np.random.default_rng(height * width + level).integers(0, 30, (height, width, 3), np.uint8)
    return np.where(mask[..., None], level, 20).astype(np.uint8) + noise, mask


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def _infos(tensors: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    return [helper.make_tensor_value_info(each.name, kinds[each.dtype], each.shape) for each in tensors]
