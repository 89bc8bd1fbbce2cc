"""A repository on disk: whole or not there, sealed, its models named and filled."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from fssdeploy.artifact import MANIFEST, Artifact
from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError
from fssdeploy.serving import repository as module
from fssdeploy.serving.configs import Options
from fssdeploy.serving.names import Names
from fssdeploy.serving.repository import (
    Repository,
    pack_strings,
    plan_command,
    read_samples,
    unpack_strings,
    write_repository,
)
from fssdeploy.systems import gfsam
from tests.cli.command import fssdeploy
from tests.serving.grey import CANVAS, write_artifact

NAMES = Names("grey")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("grey") / "artifact")


def refused(code: str, kind: type[FssError], *arguments: object, **options: object) -> FssError:
    with pytest.raises(kind) as caught:
        write_repository(*arguments, **options)  # type: ignore[arg-type]
    assert caught.value.code == code
    return caught.value


def test_what_is_written(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "repository"
    answer = fssdeploy("repo", artifact, "-o", out, "--json")
    assert answer.code == 0, answer.err
    assert set(answer.json["models"]) == set(NAMES.all) == {each.name for each in out.iterdir()} - {MANIFEST}
    repository = Repository.open(out)
    assert repository.models == list(NAMES.all) and repository.options == Options()
    assert {repository.version(model) for model in NAMES.all} == {1}
    encoder = out / NAMES.stage("encoder") / "1"
    assert {each.name for each in encoder.iterdir()} == {"model.onnx", "encoder.onnx.data"}
    assert (encoder / "model.onnx").read_bytes() == (artifact / "encoder.onnx").read_bytes()
    assert (encoder / "encoder.onnx.data").stat().st_ino == (artifact / "encoder.onnx.data").stat().st_ino
    served = out / NAMES.segment / "1"
    assert (served / "artifact" / MANIFEST).read_bytes() == (artifact / MANIFEST).read_bytes()
    assert (served / "model.py").read_text().count("\n") == 1
    # Compiled, so that the server changes no folder, and without a path of this machine.
    (compiled,) = (served / "__pycache__").iterdir()
    assert str(tmp_path).encode() not in compiled.read_bytes()
    assert list((out / NAMES.stateless / "1").iterdir()), "copying tools drop empty folders"
    assert str(tmp_path) not in (out / MANIFEST).read_text()
    assert not [each for each in out.parent.iterdir() if each != out]


def test_several_systems_in_one_repository(artifact: Path, tmp_path: Path) -> None:
    write_repository([str(artifact), f"second={artifact}"], tmp_path / "r", Options())
    assert [names.system for names in Repository.open(tmp_path / "r").systems] == ["grey", "second"]
    assert (tmp_path / "r" / "second_stage_encoder" / "1" / "model.onnx").exists()
    config = (tmp_path / "r" / "second" / "config.pbtxt").read_text()
    assert '"second_prepare_query"' in config and '"grey_' not in config


@pytest.mark.parametrize(
    ("batch", "backend", "told"), [(1, "onnxruntime", True), (1, "python", False), ("batch", "onnxruntime", False)]
)
def test_graphs_of_one_row_are_told(batch: int | str, backend: str, told: bool, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact", batch)
    report = write_repository([str(artifact)], tmp_path / "r", Options(backend=backend))
    assert any("--dynamic-batch" in note for note in report.notes) is told


def test_names_that_clash(artifact: Path, tmp_path: Path) -> None:
    for artifacts in ([str(artifact)] * 2, [f"x={artifact}", f"x_enroll={artifact}"]):
        refused("system_twice", InputError, artifacts, tmp_path / "r", Options())
    refused("system_name", InputError, [f"../x={artifact}"], tmp_path / "r", Options())
    refused("no_artifacts", InputError, [], tmp_path / "r", Options())
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    out.mkdir()
    (out / "mine").write_text("precious")
    refused("out_occupied", InputError, [str(artifact)], out, Options())
    assert [each.name for each in tmp_path.iterdir()] == ["r"] and (out / "mine").read_text() == "precious"
    (out / "mine").unlink()
    write_repository([str(artifact)], out, Options())
    assert Repository.open(out)


def test_a_full_disk_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def link(source: object, target: object) -> None:
        nonlocal count
        count += 1
        raise OSError(errno.ENOSPC if count > 5 else errno.EXDEV, "full", str(target))

    def copy(source: Path, target: Path) -> None:
        if count > 5:
            raise OSError(errno.ENOSPC, "full", str(target))
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copyfile", copy)
    refused("no_space", MachineError, [str(artifact)], tmp_path / "a" / "r", Options())
    assert count > 5 and not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_repository([str(artifact)], tmp_path / "r", Options())
    assert not list(tmp_path.iterdir())


def test_without_hard_links_files_are_copied(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", link)
    write_repository([str(artifact)], tmp_path / "r", Options())
    copied = tmp_path / "r" / NAMES.stage("encoder") / "1" / "encoder.onnx.data"
    assert copied.read_bytes() == (artifact / "encoder.onnx.data").read_bytes()
    assert copied.stat().st_nlink == 1


def test_a_damaged_artifact_is_not_served(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifact")
    data = bytearray((artifact / "encoder.onnx.data").read_bytes())
    data[7] ^= 1
    (artifact / "encoder.onnx.data").write_bytes(data)
    refused("artifact_damaged", IntegrityError, [str(artifact)], tmp_path / "r", Options())
    assert not (tmp_path / "r").exists()


def test_tensorrt_wants_its_plans(artifact: Path, tmp_path: Path) -> None:
    options = Options(backend="tensorrt", device="gpu", max_batch=4)
    error = refused("plan_missing", InputError, [str(artifact)], tmp_path / "r", options)
    assert f"--maxShapes=picture:4x3x{CANVAS}x{CANVAS}" in error.fix and "trtexec --onnx=encoder.onnx" in error.fix
    plans = tmp_path / "plans"
    plans.mkdir()
    for stage in ("encoder", "enroll", "segment"):
        (plans / f"{stage}.plan").write_bytes(stage.encode())
    write_repository([str(artifact)], tmp_path / "r", options, plans)
    assert (tmp_path / "r" / NAMES.stage("segment") / "1" / "model.plan").read_bytes() == b"segment"


def test_samples_are_requests(artifact: Path, tmp_path: Path) -> None:
    write_repository([str(artifact)], tmp_path / "r", Options())
    query = read_samples(tmp_path / "r" / NAMES.prepare_query)
    assert query["pictures"].shape == (1,) and query["pictures"][0].startswith(b"\x89PNG")
    encoder = read_samples(tmp_path / "r" / NAMES.stage("encoder"))
    assert encoder["picture"].shape == (1, 3, CANVAS, CANVAS) and encoder["picture"].dtype == np.uint8
    assert encoder["picture"].std() > 10, "a real picture"
    assert read_samples(tmp_path / "r" / NAMES.finish)["placements"].shape == (1, 7)
    assert read_samples(tmp_path / "r" / NAMES.stateless) == {}
    (tmp_path / "r" / NAMES.finish / "warmup" / "placements").write_bytes(b"123")
    with pytest.raises(IntegrityError) as caught:
        read_samples(tmp_path / "r" / NAMES.finish)
    assert caught.value.code == "sample_damaged"


def test_text_elements_there_and_back() -> None:
    elements = [b"", b"a\0b\0", b"x" * 300]
    assert unpack_strings(pack_strings(elements)) == elements
    for damaged in (b"\1", b"\5\0\0\0abc", pack_strings(elements)[:-1]):
        with pytest.raises(ValueError, match="cut off"):
            unpack_strings(damaged)


def test_a_manifest_that_cannot_be_trusted(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    write_repository([str(artifact)], out, Options())
    sound = (out / MANIFEST).read_text()
    content = json.loads(sound)
    for code, text in (
        ("repository_damaged", "no json"),
        ("repository_damaged", "[]"),
        ("repository_damaged", json.dumps({**content, "fssdeploy": "0.0.0"})),
        ("repository_damaged", json.dumps({**content, "systems": {"x": {"current": 2, "versions": {}}}})),
        ("repository_format", json.dumps({**content, "format": 99})),
    ):
        (out / MANIFEST).write_text(text)
        with pytest.raises(IntegrityError) as caught:
            Repository.open(out)
        assert caught.value.code == code
    (out / MANIFEST).unlink()
    with pytest.raises(InputError) as missing:
        Repository.open(out)
    assert missing.value.code == "repository_missing"


def test_the_command_line(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    fssdeploy("repo", artifact, "-o", out, "--backend", "pytorch").check_refused("backend_unknown", 3)
    fssdeploy("repo", tmp_path / "nowhere", "-o", out).check_refused("artifact_missing", 3)
    fssdeploy("repo", "-o", out).check_refused("usage", 3)
    answer = fssdeploy("repo", "-o", out, f"mine={artifact}", "--backend", "python", "--max-batch", 3)
    assert answer.code == 0 and "mine_stage_encoder" in answer.out
    assert fssdeploy("repo", "check", out).code == 0
    assert "promote" in fssdeploy("repo", "--help").out


def test_plans_of_prompted_stages_leave_shared_inputs_alone() -> None:
    """They have a fixed shape; rows are the prompts or references of one picture, not requests."""
    specs = {spec.name: spec for spec in (gfsam.specs(gfsam.PRESETS["tiny"])[name] for name in ("decoder", "affinity"))}
    artifact = cast(Artifact, SimpleNamespace(specs=specs, graph=lambda stage, kind: Path(f"{stage}.onnx")))
    for stage, free, shared in (("decoder", "points:1x2x2", "embedding"), ("affinity", "rows:1x128", "features")):
        command = plan_command(stage, artifact, Options("tensorrt", max_batch=4, device="gpu"))
        assert f"--minShapes={free}" in command and shared not in command
        assert f"--maxShapes={free.replace(':1x', ':1024x')}" in command
