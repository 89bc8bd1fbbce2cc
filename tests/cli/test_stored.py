"""Damaged, altered and mismatched artifacts and banks: exit code 5, one line, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fssdeploy.artifact import MANIFEST, digest
from tests.cli.command import Answer, fssdeploy

if TYPE_CHECKING:
    from tests.cli.conftest import Workplace


@pytest.fixture
def copy(workplace: Workplace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workplace.artifact, tmp_path / "artifact"))


def use(artifact: Path, workplace: Workplace, out: Path, *arguments: object) -> Answer:
    return fssdeploy("segment", artifact, "--bank", workplace.bank, workplace.second, "-o", out, "--json", *arguments)


def reseal(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the digest that fits, as somebody who means it would."""
    manifest = json.loads((artifact / MANIFEST).read_text())
    change(manifest)
    manifest["digest"] = digest(manifest)
    (artifact / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["encoder.ort.onnx", "encoder.onnx.data", "segment.onnx", "parity.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "a folder"])
def test_damaged_files(workplace: Workplace, copy: Path, tmp_path: Path, name: str, damage: str) -> None:
    data = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if damage == "cut":
        (copy / name).write_bytes(data[:-7])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    elif damage == "a folder":
        (copy / name).mkdir()
    answer = use(copy, workplace, tmp_path / "out")
    assert name in answer.check_refused("artifact_damaged", 5)
    assert answer.json["error"]["code"] == "artifact_damaged"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"digest": 1, "format": 1}', b'{"name": "a web page"}']
)
def test_manifests_that_are_none(workplace: Workplace, copy: Path, tmp_path: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    use(copy, workplace, tmp_path / "out").check_refused("manifest_damaged", 5)


def test_an_altered_manifest(workplace: Workplace, copy: Path, tmp_path: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"untrained"', '"trained"'))
    line = use(copy, workplace, tmp_path / "out").check_refused("manifest_damaged", 5)
    assert "altered" in line
    (copy / MANIFEST).write_text(text.replace('"format": 1', '"format": 2'))
    use(copy, workplace, tmp_path / "out").check_refused("artifact_format", 5)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no stages": lambda manifest: manifest.pop("stages"),
    "no files": lambda manifest: manifest.pop("files"),
    "no weights": lambda manifest: manifest.pop("weights"),
    "no precision": lambda manifest: manifest.pop("precision"),
    "stages are a list": lambda manifest: manifest.update(stages=[]),
    "files are a list": lambda manifest: manifest.update(files=["encoder.onnx"]),
    "no canvas": lambda manifest: manifest["preprocessing"].pop("canvas"),
    "no shape": lambda manifest: manifest["stages"]["encoder"]["spec"]["inputs"][0].pop("shape"),
    "a graph that is not sealed": lambda manifest: manifest["files"].pop("segment.onnx"),
    "a graph elsewhere": lambda manifest: manifest["stages"]["encoder"]["files"].update(portable="../other.onnx"),
    "a sealed file elsewhere": lambda manifest: manifest["files"].update(
        {"../other.onnx": manifest["files"]["segment.onnx"]}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_manifests_that_make_no_sense(
    workplace: Workplace, copy: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    reseal(copy, change)
    use(copy, workplace, tmp_path / "out").check_refused("manifest_damaged", 5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_graphs_that_no_runtime_reads(workplace: Workplace, copy: Path, tmp_path: Path, runtime: str) -> None:
    """Sealed, but not ONNX: the runtime's own complaint, on one line."""
    pytest.importorskip(runtime)
    import hashlib

    content = b"no graph" * 99
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name in ("encoder.onnx", "encoder.ort.onnx"):
        (copy / name).write_bytes(content)
    reseal(copy, lambda manifest: manifest["files"].update({"encoder.onnx": entry, "encoder.ort.onnx": entry}))
    line = use(copy, workplace, tmp_path / "out", "--runtime", runtime).check_refused("graph_unreadable", 5)
    assert "encoder" in line
    assert not (tmp_path / "out").exists()


def test_a_bank_of_another_artifact(workplace: Workplace, copy: Path, tmp_path: Path) -> None:
    reseal(copy, lambda manifest: manifest.update(fingerprint="0" * 64))
    use(copy, workplace, tmp_path / "out").check_refused("bank_of_other_artifact", 5)
    assert not (tmp_path / "out").exists()
    bank = shutil.copytree(workplace.bank, tmp_path / "bank")
    arguments = ["--image", workplace.first, "--mask", workplace.mask, "--bank", bank]
    for more in ([], ["--add"]):
        fssdeploy("enroll", copy, "disc", *arguments, *more).check_refused("bank_of_other_artifact", 5)
    assert fssdeploy("bank", "list", bank, "--json").json["classes"][1]["version"] == 1


def test_damaged_banks(workplace: Workplace, tmp_path: Path) -> None:
    bank = Path(shutil.copytree(workplace.bank, tmp_path / "bank"))
    command = ["segment", workplace.artifact, "--bank", bank, workplace.second, "-o", tmp_path / "out", "--class"]
    for state in (bank / "states").iterdir():
        state.write_bytes(state.read_bytes()[:-9])
    fssdeploy(*command, "disc").check_refused("state_damaged", 5)
    assert "disc" in fssdeploy("bank", "verify", bank).check_refused("bank_damaged", 5)
    (bank / "index.sqlite").write_bytes(b"x" * 5000)
    fssdeploy(*command, "disc").check_refused("bank_damaged", 5)
    assert not (tmp_path / "out").exists()


def test_an_artifact_without_the_stage_that_is_needed(workplace: Workplace, copy: Path, tmp_path: Path) -> None:
    reseal(copy, lambda manifest: manifest["stages"].pop("enroll"))
    arguments = ["--image", workplace.first, "--mask", workplace.mask, "--bank", tmp_path / "bank"]
    line = fssdeploy("enroll", copy, "disc", *arguments).check_refused("stage_missing", 3)
    assert "--components all" in line
    assert not (tmp_path / "bank").exists()
    assert use(copy, workplace, tmp_path / "out").code == 0


def test_looking_after_a_bank(workplace: Workplace, tmp_path: Path) -> None:
    bank = Path(shutil.copytree(workplace.bank, tmp_path / "bank"))
    listed = fssdeploy("bank", "list", bank, "--json").json
    assert [(entry["class"], entry["version"], entry["shots"]) for entry in listed["classes"]] == [
        ("corner", 1, 1),
        ("disc", 1, 1),
    ]
    assert "corner" in fssdeploy("bank", "list", bank).out
    assert fssdeploy("bank", "verify", bank, "--json").json["problems"] == []
    assert fssdeploy("bank", "remove", bank, "corner", "--json").json["versions"] == 1
    fssdeploy("bank", "remove", bank, "corner").check_refused("class_unknown", 3)
    assert fssdeploy("bank", "prune", bank, "--json").json["files"] == 1
    fssdeploy("bank", "prune", bank, "--keep", 0).check_refused("prune_keep", 3)
    for verb in ("list", "verify", "prune"):
        fssdeploy("bank", verb, tmp_path / "none").check_refused("bank_missing", 3)
    assert not (tmp_path / "none").exists()
