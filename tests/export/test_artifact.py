"""Exported artifacts: what they hold, what proves them, and that failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import fssdeploy
from fssdeploy.artifact import Artifact, digest, load
from fssdeploy.errors import CheckFailedError, FssError, InputError, IntegrityError, MachineError
from fssdeploy.export import artifact as writer
from fssdeploy.export.artifact import ExportRequest, export_artifact, plan
from fssdeploy.export.parity import TOLERANCES
from fssdeploy.systems import get_system
from fssdeploy.systems.fsdino import PRESETS, FSDino, FSDinoConfig, build, stage_parameters
from fssdeploy.weights.fsdino import Provenance, fill
from tests.networks import SMALL


def network(config: FSDinoConfig = SMALL, seed: int = 0) -> tuple[FSDino, Provenance]:
    model = build(config)
    return model, fill(model, [], untrained_seed=seed)


def request(config: FSDinoConfig = SMALL, components: str = "all", **options: object) -> ExportRequest:
    return ExportRequest(get_system("fsdino"), "test", config, components, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dynamic") / "artifact"
    export_artifact(*network(), request(dynamic_batch=True), out)
    return out


def copy_of(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def test_an_artifact_holds_what_the_issue_names(tiny_artifact: Path) -> None:
    names = {path.name for path in tiny_artifact.iterdir()}
    assert {"encoder.onnx", "enroll.onnx", "segment.onnx", "manifest.json", "parity.json"} <= names
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    assert manifest["weights"] == {
        "status": "untrained",
        "untrained_groups": ["encoder", "adapter", "svp", "correlation", "dense_prompt", "position", "decoder"],
        "seed": 0,
        "sources": [],
    }
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert manifest["preprocessing"] == {"canvas": PRESETS["tiny"].image_size, "patch": 14, "geometry": "squash"}
    Artifact.open(tiny_artifact).verify()


def test_parity_compares_tensors_and_masks_on_every_graph(tiny_artifact: Path) -> None:
    parity = json.loads((tiny_artifact / "parity.json").read_text())
    assert parity["holds"] is True
    assert parity["first_drift"] is None
    assert {"onnxruntime (portable)", "onnxruntime (fused)"} <= set(parity["engines"])
    assert {row["batch"] for row in parity["tensors"]} == {1, 3}
    assert {(row["stage"], row["output"]) for row in parity["tensors"]} == {
        ("encoder", "tokens"),
        ("encoder", "embedding"),
        ("enroll", "prototype"),
        ("enroll", "svp"),
        ("enroll", "kernel4d"),
        ("segment", "mask_logits"),
        ("segment", "prior_logits"),
    }
    limits = TOLERANCES["fp32"]
    assert all(row["max_abs_over_std"] <= limits.max_abs_over_std for row in parity["tensors"])
    assert {row["cut"] for row in parity["masks"]} == {"0", "median"}
    assert all(row["iou"] >= limits.mask_iou for row in parity["masks"] if row["cut"] == "median")
    assert any(0.4 < row["foreground"] < 0.6 for row in parity["masks"])  # the comparison is not of empty masks
    assert "docs/export.md" in parity["tolerance"]["origin"]


def test_graphs_are_standard_and_carry_no_trace_of_the_exporting_machine(tiny_artifact: Path) -> None:
    here = str(Path(fssdeploy.__file__).parent.parent).encode()
    for path in sorted(tiny_artifact.glob("*.onnx")):
        data = path.read_bytes()
        assert here not in data, path.name
        assert b"site-packages" not in data, path.name
        assert b"stack_trace" not in data, path.name
        model = onnx.load(str(path), load_external_data=False)
        domains = {node.domain for node in model.graph.node}
        assert domains == ({"", "com.microsoft"} if path.name.endswith(".ort.onnx") else {""})


def test_both_forms_of_attention_share_one_weights_file(tiny_artifact: Path) -> None:
    locations = set()
    for name in ("encoder.onnx", "encoder.ort.onnx"):
        model = onnx.load(str(tiny_artifact / name), load_external_data=False)
        for tensor in model.graph.initializer:
            locations |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    assert locations == {"encoder.onnx.data"}


def test_planned_parameters_are_those_in_the_graphs(tiny_artifact: Path) -> None:
    model, _ = network(PRESETS["tiny"])
    grid = model.config.grid
    tables = {"encoder": model.encoder.pos_embed.numel(), "segment": model.position(grid, grid).numel(), "enroll": 0}
    for stage, table in tables.items():
        graph = onnx.load(str(tiny_artifact / f"{stage}.onnx"), load_external_data=False).graph
        held = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
        extra = held - stage_parameters(model, stage)
        # Position tables are baked in; LayerScale (2 per block) has gone into the linear layers.
        folded = 2 * model.config.encoder.depth * model.config.encoder.dim if stage == "encoder" else 0
        assert abs(extra + folded - (table if stage == "segment" else 0)) <= 700, (stage, extra, table)


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = plan(request(PRESETS["base"]))
    assert report.data["stages"]["encoder"]["parameters"] > 87_000_000
    assert 340 < report.data["stages"]["encoder"]["megabytes"] < 360
    assert list(tmp_path.iterdir()) == []


def test_dynamic_and_fixed_batch_give_the_same(dynamic: Path, tmp_path: Path, picture: np.ndarray) -> None:
    fixed = tmp_path / "fixed"
    export_artifact(*network(), request(), fixed)
    pictures = [np.roll(picture, 7 * index, 1) for index in range(5)]
    for name, array in load(fixed).encode(pictures).tensors.items():
        np.testing.assert_allclose(array, load(dynamic).encode(pictures).tensors[name], rtol=1e-4, atol=1e-4)
    shapes = [list(spec.shape) for spec in Artifact.open(dynamic).specs["encoder"].inputs]
    assert shapes == [["batch", 3, 70, 70]]
    assert list(Artifact.open(fixed).specs["encoder"].inputs[0].shape) == [1, 3, 70, 70]
    # Batch size and precision are no part of what a bank is bound to.
    assert Artifact.open(fixed).fingerprint == Artifact.open(dynamic).fingerprint


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precisions_hold_their_own_limits(tmp_path: Path, precision: str) -> None:
    if precision == "bf16":
        pytest.importorskip("openvino")
    out = tmp_path / precision
    tiny = PRESETS["tiny"]
    export_artifact(*network(tiny), request(tiny, precision=precision), out)
    parity = json.loads((out / "parity.json").read_text())
    assert parity["precision"] == precision
    assert any(row["max_abs"] > 1e-6 for row in parity["tensors"])  # it really is another precision
    size = sum((out / f"{stage}.onnx.data").stat().st_size for stage in ("encoder", "segment"))
    assert size < 0.62 * 4 * sum(stage_parameters(build(tiny), stage) for stage in ("encoder", "segment"))
    if precision == "bf16":
        with pytest.raises(InputError, match="bfloat16"):
            load(out, "onnxruntime")


def test_chosen_components_only(tmp_path: Path) -> None:
    out = tmp_path / "encoder_only"
    export_artifact(*network(), request(components="encoder"), out)
    assert not (out / "segment.onnx").exists()
    with pytest.raises(InputError, match="no stage 'enroll'"):
        system = load(out)
        system.enroll(system.encode([np.zeros((20, 20, 3), np.uint8)]), [np.ones((20, 20), bool)])
    with pytest.raises(InputError, match="decoder"):
        request(components="encoder,decoder")


def test_a_drifting_graph_is_not_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writer.export_stage

    def drifting(module, spec, folder, **options):  # noqa: ANN001, ANN003, ANN202
        files = original(module, spec, folder, **options)
        if spec.name == "enroll":
            data = np.fromfile(folder / files.weights, np.float32)
            data[: data.size // 2] *= 1.01
            data.tofile(folder / files.weights)
        return files

    monkeypatch.setattr(writer, "export_stage", drifting)
    out = tmp_path / "out"
    with pytest.raises(CheckFailedError, match=r"enroll\.\w+ on onnxruntime") as caught:
        export_artifact(*network(), request(), out)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_graph_is_not_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writer.export_stage

    def poisoned(module, spec, folder, **options):  # noqa: ANN001, ANN003, ANN202
        files = original(module, spec, folder, **options)
        if spec.name == "segment":
            np.full((folder / files.weights).stat().st_size // 4, np.nan, np.float32).tofile(folder / files.weights)
        return files

    monkeypatch.setattr(writer, "export_stage", poisoned)
    with pytest.raises(CheckFailedError, match="segment"):
        export_artifact(*network(), request(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["exporting segment", "parity: enroll", "sealing"])
def test_an_interrupted_export_leaves_the_old_artifact(dynamic: Path, tmp_path: Path, moment: str) -> None:
    out = copy_of(dynamic, tmp_path)
    before = (out / "manifest.json").read_bytes()

    def interrupt(text: str) -> None:
        if text.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_artifact(*network(seed=1), request(), out, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert (out / "manifest.json").read_bytes() == before
    Artifact.open(out).verify()


def test_an_old_artifact_is_replaced_whole(dynamic: Path, tmp_path: Path) -> None:
    out = copy_of(dynamic, tmp_path)
    export_artifact(*network(seed=1), request(components="encoder"), out)
    assert not (out / "segment.onnx").exists()
    assert Artifact.open(out).manifest["weights"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    Artifact.open(out).verify()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not an artifact"):
        export_artifact(*network(), request(components="enroll"), tmp_path / "notes")
    with pytest.raises(InputError, match="not an artifact"):
        export_artifact(*network(), request(components="enroll"), tmp_path / "file")
    with pytest.raises(MachineError):
        export_artifact(*network(), request(components="enroll"), tmp_path / "file" / "below")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_sync", full)
    with pytest.raises(MachineError, match="no space left"):
        export_artifact(*network(), request(components="enroll"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["encoder.onnx", "encoder.onnx.data", "segment.onnx.data", "parity.json"])
def test_every_damaged_file_is_found_on_load(dynamic: Path, tmp_path: Path, name: str, damage) -> None:  # noqa: ANN001
    artifact = copy_of(dynamic, tmp_path)
    damage(artifact / name)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")) as caught:
        load(artifact)
    assert caught.value.exit_code == 5


def _edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_tampered_and_unreadable_manifests(dynamic: Path, tmp_path: Path) -> None:
    artifact = copy_of(dynamic, tmp_path)
    _edit_manifest(artifact, fingerprint="0" * 64)
    with pytest.raises(IntegrityError, match="altered after export"):
        load(artifact)
    _edit_manifest(artifact, format=99)
    with pytest.raises(IntegrityError, match="format 99"):
        load(artifact)
    for content in (b"{", b"\xff\xfe", b"[]", b'{"format": 1}', b""):
        (artifact / "manifest.json").write_bytes(content)
        with pytest.raises(FssError):
            load(artifact)
    with pytest.raises(InputError, match="not an artifact"):
        load(tmp_path / "nothing")


def test_graphs_that_do_not_parse_are_named(dynamic: Path, tmp_path: Path, picture: np.ndarray) -> None:
    """Damage that came before sealing, which no checksum can find."""
    artifact = copy_of(dynamic, tmp_path)
    manifest = json.loads((artifact / "manifest.json").read_text())
    for runtime in ("onnxruntime", "openvino"):
        if runtime == "openvino":
            pytest.importorskip("openvino")
        graph = manifest["stages"]["encoder"]["files"].get(runtime, "encoder.onnx")
        (artifact / graph).write_bytes(b"not a graph")
        with pytest.raises(IntegrityError, match=f"'.*{graph}' cannot be loaded"):
            load(artifact, runtime, verify=False).encode([picture])


def test_the_digest_covers_everything_but_itself() -> None:
    assert digest({"a": 1, "digest": "x"}) == digest({"digest": "y", "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_letterbox_is_another_fingerprint(dynamic: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, geometry="letterbox")
    out = tmp_path / "letterbox"
    export_artifact(*network(config), request(config, components="encoder,enroll"), out)
    assert Artifact.open(out).fingerprint != Artifact.open(dynamic).fingerprint
