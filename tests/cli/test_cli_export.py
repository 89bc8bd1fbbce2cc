"""`fssdeploy export`: what it refuses, what it plans, and that a failed proof promotes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fssdeploy import shipped
from fssdeploy.artifact import Artifact
from fssdeploy.export import parity
from fssdeploy.export.parity import Tolerance
from fssdeploy.systems import fsdino
from tests.cli.command import fssdeploy
from tests.networks import SMALL


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny preset made smaller still: these tests look at the command, not at the network."""
    monkeypatch.setitem(fsdino.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(shipped, "checkpoint", lambda name: None)  # it would not fit


def test_untrained_weights_are_said_to_be_untrained_everywhere(tmp_path: Path) -> None:
    command = ["export", "fsdino", "--components", "enroll", "--out", tmp_path / "new" / "a"]
    text = fssdeploy(*command)
    assert text.code == 0 and "UNTRAINED" in text.out
    artifact = Artifact.open(tmp_path / "new" / "a")
    assert artifact.manifest["weights"]["status"] == "untrained" and "UNTRAINED" in artifact.weights_note
    again = fssdeploy(*command, "--json")
    assert again.err == "" and "UNTRAINED" in again.json["notes"][0]
    assert again.json["manifest"] == json.loads((tmp_path / "new" / "a" / "manifest.json").read_text())
    assert again.json["parity"] == json.loads((tmp_path / "new" / "a" / "parity.json").read_text())
    assert again.json["parity"]["holds"] is True
    assert os.listdir(tmp_path / "new") == ["a"]


def test_a_failed_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.TOLERANCES, "fp32", Tolerance(0.0, 0.0, 1.0, 0.0))
    arguments = ["--components", "enroll", "--out", tmp_path / "new" / "a", "--json"]
    answer = fssdeploy("export", "fsdino", *arguments)
    assert "enroll." in answer.check_refused("parity_failed", 2)
    assert answer.json["error"]["exit_code"] == 2
    assert os.listdir(tmp_path) == []


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = fssdeploy("export", "fsdino", "--dry-run", "--json").json
    assert list(plan["stages"]) == ["encoder", "enroll", "segment"]
    assert plan["stages"]["encoder"]["parameters"] > 1000
    assert plan["stages"]["encoder"]["spec"]["inputs"][0]["shape"] == [1, 3, 70, 70]
    assert plan["megabytes"] == pytest.approx(sum(stage["megabytes"] for stage in plan["stages"].values()))
    assert any("UNTRAINED" in note for note in plan["notes"])
    text = fssdeploy("export", "fsdino", "--dry-run", "--preset", "large").out
    assert "encoder.onnx" in text and "(1, 3, 518, 518)" in text and "--untrained" in text
    assert "UNTRAINED" in fssdeploy("export", "fsdino", "--dry-run", "--preset", "base", "--untrained").out
    assert os.listdir(tmp_path) == []


def checkpoints(folder: Path) -> dict[str, Path]:
    """Files that are no usable checkpoint, by the code of their error."""
    torch.save(
        {"state_dict": {"cls_token": torch.zeros(1, 1, 48), "patch_embed.proj.weight": torch.zeros(3)}},
        folder / "other.pt",
    )
    torch.save(torch.nn.Linear(2, 2), folder / "code.pt")
    (folder / "cut.pt").write_bytes((folder / "other.pt").read_bytes()[:-200])
    (folder / "text.pt").write_text("hello")
    (folder / "empty.pt").touch()
    return {
        "checkpoint_architecture": folder / "other.pt",
        "checkpoint_unsafe": folder / "code.pt",
        "checkpoint_damaged": folder / "cut.pt",
        "checkpoint_format": folder / "text.pt",
        "file_empty": folder / "empty.pt",
        "file_missing": folder / "none.pt",
        "file_is_folder": folder,
    }


def test_checkpoints_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for code, file in checkpoints(tmp_path / "weights").items():
        answer = fssdeploy("export", "fsdino", "--weights", file, "--out", tmp_path / "new" / "a")
        assert file.name in answer.check_refused(code, 3)
    assert os.listdir(tmp_path) == ["weights"]


@pytest.mark.parametrize("preset", ["base", "large"])
def test_presets_without_weights_say_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setitem(fsdino.PRESETS, preset, SMALL)
    line = fssdeploy("export", "fsdino", "--preset", preset, "--out", tmp_path / "a").check_refused(
        "weights_missing", 3
    )
    assert "dinov2_vit" in line and "--untrained" in line
    answer = fssdeploy(
        "export", "fsdino", "--preset", preset, "--out", tmp_path / "a", "--untrained", "--components", "enroll"
    )
    assert answer.code == 0 and "UNTRAINED" in answer.out


def test_arguments_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases: dict[tuple[object, ...], str] = {
        ("nothing",): "system_unknown",
        ("fsdino", "--preset", "huge"): "preset_unknown",
        ("fsdino", "--precision", "fp8"): "precision_unknown",
        ("fsdino", "--components", "encoder,decoder"): "component_unknown",
        ("fsdino", "--components", ""): "component_unknown",
        ("fsdino", "--image-size", "71"): "image_size",
        ("fsdino", "--image-size", "-14"): "image_size",
        ("fsdino", "--image-size", "big"): "usage",
        ("fsdino", "--variant", "half"): "option_unknown",
        ("fsdino", "--set", "nothing=1"): "option_unknown",
        ("fsdino", "--set", "geometry=round"): "option_unknown",
        ("fsdino", "--set", "train_adapter=maybe"): "option_unknown",
        ("fsdino", "--set", "decoder_heads=0"): "option_unknown",
        ("fsdino", "--set", "decoder_heads=5"): "option_unknown",
        ("fsdino", "--set", "decoder_dim=20"): "option_unknown",
        ("fsdino", "--set", "tap_block=-1"): "option_unknown",
        ("fsdino", "--set", "registers=-1"): "option_unknown",
        (): "usage",
    }
    for arguments, code in cases.items():
        answer = fssdeploy("export", *arguments, "--json")
        answer.check_refused(code, 3)
        assert answer.json["error"]["code"] == code
    assert os.listdir(tmp_path) == []


def test_places_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("web", "mixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "web" / "index.html").write_text("x")
    (tmp_path / "mixed" / "encoder.onnx").write_text("x")
    (tmp_path / "mixed" / "bank").mkdir()
    for out, code, exit_code in (
        ("file", "out_occupied", 3),
        ("web", "out_occupied", 3),
        ("mixed", "out_occupied", 3),
        ("file/below", "not_a_folder", 4),
        ("/proc/none/a", "folder_missing", 4),
    ):
        arguments = ["--components", "enroll", "--out", tmp_path / out]
        fssdeploy("export", "fsdino", *arguments).check_refused(code, exit_code)
    assert sorted(os.listdir(tmp_path)) == ["file", "mixed", "web"]
    assert sorted(os.listdir(tmp_path / "web")) == ["index.html", "manifest.json"]
    assert sorted(os.listdir(tmp_path / "mixed")) == ["bank", "encoder.onnx"]


def test_a_link_to_an_artifact_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert fssdeploy("export", "fsdino", "--components", "enroll", "--out", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    Artifact.open(tmp_path / "real").verify()


def test_a_full_disk(small_disk: Path) -> None:
    answer = fssdeploy("export", "fsdino", "--out", small_disk / "new" / "a", "--json")
    answer.check_refused("no_space", 4)
    assert os.listdir(small_disk) == []
