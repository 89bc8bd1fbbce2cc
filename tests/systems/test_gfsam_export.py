"""GF-SAM as an artifact: exported, opened without PyTorch, the same masks as the networks themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fssdeploy.artifact import Artifact, load
from fssdeploy.cli.export import configure, sources
from fssdeploy.deployment import Deployment
from fssdeploy.engines.torch import TorchEngine
from fssdeploy.errors import InputError
from fssdeploy.export.artifact import ExportRequest, export_artifact, plan
from fssdeploy.glue.gfsam.system import GFSam
from fssdeploy.modules.dinov2 import RELEASED, ViTConfig
from fssdeploy.modules.sam import Sam, SamConfig
from fssdeploy.systems import get_system, gfsam
from fssdeploy.weights.dinov2 import save_dinov2
from fssdeploy.weights.gfsam import fill
from fssdeploy.weights.sam import save_sam

SMALL = gfsam.GFSamConfig(
    encoder=ViTConfig(48, 2, 3, table=5),
    sam=SamConfig(
        32, 2, 2, (1,), image_size=96, patch=8, window=5, out=32, decoder_heads=2, decoder_mlp=64, iou_hidden=32
    ),
    image_size=84,
    max_points=9,
)


def small_networks(seed: int = 0) -> gfsam.GFSamNetworks:
    model = gfsam.build(SMALL)
    gfsam.initialise_untrained(model, seed)
    return model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = gfsam.build(SMALL)
    provenance = fill(model, [], untrained_seed=0)
    out = tmp_path_factory.mktemp("artifacts") / "gfsam"
    export_artifact(model, provenance, ExportRequest(get_system("gfsam"), "small", SMALL), out)
    return out


def test_exported_graphs_give_the_masks_of_the_networks(artifact: Path, picture: np.ndarray, disc: np.ndarray) -> None:
    exported = load(artifact, threads=1)
    assert isinstance(exported, GFSam)
    specs = gfsam.specs(SMALL)
    engine = TorchEngine(gfsam.reference_stages(small_networks()), specs)
    research = GFSam("gfsam", specs, engine, gfsam.preprocessing(SMALL), exported.fingerprint)
    query = np.ascontiguousarray(picture[:, ::-1])
    answers = []
    for system in (research, exported):
        state = system.enroll(system.encode([picture, query]), [disc, disc[:, ::-1]])
        trace: dict[str, np.ndarray] = {}
        masks = system.segment(system.encode([query, picture]), {"disc": state}, trace)
        answers.append((masks, trace))
    (expected, steps), (got, exported_steps) = answers
    assert len(steps["points_cell"]) > 1
    for name in ("points_cell", "weak_labels", "point_labels"):
        np.testing.assert_array_equal(exported_steps[name], steps[name])
    for row in range(2):
        wanted = expected.binary(row, "disc")
        assert wanted.any()
        assert (got.binary(row, "disc") != wanted).mean() < 1e-3
        np.testing.assert_allclose(got.logits[row]["disc"], expected.logits[row]["disc"], atol=2e-3)


def test_the_manifest_says_how_to_run_it(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    assert opened.manifest["preprocessing"] == {
        "canvas": 96,
        "patch": 14,
        "geometry": "squash",
        "compat": "corrected",
        "max_points": 9,
    }
    shapes = {name: [tensor.shape[0] for tensor in spec.inputs] for name, spec in opened.specs.items()}
    assert shapes == {
        "encoder": [1],
        "affinity": ["batch", 1],
        "sam_encoder": [1],
        "decoder": ["batch", "batch", 1],
    }
    parity = json.loads((artifact / "parity.json").read_text())
    assert parity["holds"]
    assert parity["masks"]
    assert gfsam.GFSamConfig.from_dict(opened.manifest["config"]) == SMALL


def test_the_exported_pipeline_runs_without_torch(artifact: Path, picture: np.ndarray, disc: np.ndarray) -> None:
    script = (
        "import sys, numpy as np\n"
        "from fssdeploy.artifact import load\n"
        "system = load(sys.argv[1], threads=1)\n"
        "picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)\n"
        "mask = np.zeros((90, 120), bool)\n"
        "mask[20:60, 30:80] = True\n"
        "features = system.encode([picture])\n"
        "print(system.segment(features, {'a': system.enroll(features, [mask])}).logits[0]['a'].shape)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(90, 120)"


def test_classes_come_from_a_bank(artifact: Path, tmp_path: Path, picture: np.ndarray, disc: np.ndarray) -> None:
    deployment = Deployment(load(artifact, threads=1), tmp_path / "bank")
    assert deployment.enroll("disc", [picture], [disc]).shots == 1
    first = deployment.segment(picture)["disc"]
    assert deployment.enroll("disc", [picture[:, ::-1].copy()], [disc[:, ::-1].copy()], add=True).shots == 2
    second = deployment.segment(picture)["disc"]
    assert (first.version, second.version) == (1, 2)
    assert first.mask.shape == second.mask.shape == picture.shape[:2]


def test_weights_come_from_official_files_by_name(tmp_path: Path) -> None:
    source = small_networks(seed=3)
    save_dinov2(source.encoder, tmp_path / "dino.safetensors", {})
    save_sam(source.sam, tmp_path / "sam.safetensors", {})
    model = gfsam.build(SMALL)
    provenance = fill(model, [tmp_path / "sam.safetensors", tmp_path / "dino.safetensors"], None)
    assert provenance.status == "trained"
    assert [item["groups"] for item in provenance.sources] == [["sam"], ["encoder"]]
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    partial = fill(gfsam.build(SMALL), [tmp_path / "sam.safetensors"], 0)
    assert (partial.status, partial.untrained_groups) == ("partial", ["encoder"])
    with pytest.raises(InputError, match="lack encoder"):
        fill(gfsam.build(SMALL), [tmp_path / "sam.safetensors"], None)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = Sam(SamConfig(16, 1, 1, image_size=96, patch=8, out=16, decoder_heads=2))
    save_sam(other, tmp_path / "sam.safetensors", {})
    with pytest.raises(InputError, match="does not fit"):
        fill(gfsam.build(SMALL), [tmp_path / "sam.safetensors"], 0)


def test_the_command_line_chooses_networks_and_options() -> None:
    config = configure("gfsam", "base", options=["encoder=vits14", "sam=vit_l", "compat=original", "max_points=32"])
    assert config.encoder == RELEASED["vits14"]
    assert (config.sam.dim, config.compat, config.max_points) == (1024, "original", 32)
    registers = configure("gfsam", "large", options=["registers=4", "antialias=true"])
    assert registers.encoder.registers == 4
    assert registers.antialias
    for options, what in (["sam=vit_x"], "vit_x"), (["compat=new"], "compat"), (["max_points=0"], "max_points"):
        with pytest.raises(InputError, match=what):
            configure("gfsam", "base", options=options)
    with pytest.raises(InputError, match="image size 100"):
        configure("gfsam", "base", image_size=100)
    with pytest.raises(InputError, match="variant"):
        configure("gfsam", "base", variant="compact")


def test_the_tiny_preset_has_weights_whatever_its_options() -> None:
    files, seed = sources("gfsam", "tiny", configure("gfsam", "tiny", options=["compat=original"]), [], False)
    assert [file.stem for file in files] == ["fsdino-tiny", "sam-tiny"]
    assert seed is None
    assert fill(gfsam.build(gfsam.PRESETS["tiny"]), files, None).status == "trained"
    assert sources("gfsam", "tiny", configure("gfsam", "tiny", options=["registers=2"]), [], False) == ([], 0)


def test_sizes_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = gfsam.build(gfsam.PRESETS["large"])
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 304_368_640
    assert sum(parameter.numel() for parameter in model.sam.parameters()) == 641_090_608 + 256  # the position matrix
    specs = gfsam.specs(model.config)
    assert specs["encoder"].outputs[0].shape == ("batch", 37 * 37, 1024)
    assert specs["decoder"].outputs[0].shape == ("batch", 1, 256, 256)


def test_a_dry_run_lists_the_stages() -> None:
    report = plan(ExportRequest(get_system("gfsam"), "small", SMALL))
    assert list(report.data["stages"]) == ["encoder", "affinity", "sam_encoder", "decoder"]


def test_parameters_of_stages_are_those_in_their_graphs(artifact: Path) -> None:
    for name, stage in Artifact.open(artifact).manifest["stages"].items():
        stored = (artifact / stage["files"]["weights"]).stat().st_size / 4
        # Tables (positions, the resize) stand beside the parameters.
        assert stage["parameters"] <= stored <= stage["parameters"] + 25_000, name
