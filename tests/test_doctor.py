"""The doctor: what it says follows from what is installed, and asking it loads nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fssdeploy import doctor

HEAVY = ("torch", "torchvision", "openvino", "tensorrt", "onnx", "triton", "cupy", "skimage")
ALL = dict.fromkeys(doctor.PACKAGES, "1.0")
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def paths(
    monkeypatch: pytest.MonkeyPatch,
    packages: Mapping[str, str | None],
    providers: tuple[str, ...] = PROVIDERS,
    gpu: str | None = "a GPU",
    absent: tuple[str, ...] = (),
    server: bool = True,
) -> dict[str, Any]:
    """What the doctor says of a machine with these packages, providers and GPU, all parts of fssdeploy but `absent`."""
    monkeypatch.setattr(doctor, "_installed", lambda name, _: packages.get(name))
    monkeypatch.setattr(doctor, "_has_module", lambda name: name not in absent)
    monkeypatch.setattr(doctor, "_providers", lambda: (providers, ""))
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "_has_server", lambda: server)
    found: dict[str, Any] = doctor.diagnose().to_dict()["paths"]
    return found


def test_with_everything_every_path_works(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths(monkeypatch, ALL)
    assert set(found) == {way.name for way in doctor.WAYS}
    assert all(path == {"ok": True, "missing": [], "fix": ""} for path in found.values())


@pytest.mark.parametrize(
    ("package", "path", "fix"),
    [
        ("openvino", "deploy_openvino", "pip install 'fssdeploy[openvino]'"),
        ("onnxscript", "export", "pip install 'fssdeploy[export]'"),
        ("torch", "train", "pip install 'fssdeploy[train]'"),
        ("tensorrt", "tensorrt", "pip install 'fssdeploy[gpu]'"),
        ("tritonclient", "serve", "pip install 'fssdeploy[serve]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, package: str, path: str, fix: str
) -> None:
    found = paths(monkeypatch, {**ALL, package: None})
    assert found[path] == {"ok": False, "missing": [package], "fix": fix}
    assert found["deploy_onnxruntime_cpu"]["ok"]


def test_without_a_gpu_no_command_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths(monkeypatch, ALL, gpu=None)
    for name in ("deploy_onnxruntime_cuda", "tensorrt", "gpu_kernels"):
        assert not found[name]["ok"]
        assert "GPU" in found[name]["missing"][0]
        assert found[name]["fix"] == ""
    assert found["export"]["ok"]


def test_cuda_needs_the_provider_not_just_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths(monkeypatch, ALL, providers=("CPUExecutionProvider",))
    assert found["deploy_onnxruntime_cpu"]["ok"]
    assert found["deploy_onnxruntime_cuda"]["missing"] == ["CUDAExecutionProvider in ONNX Runtime"]
    assert "onnxruntime-gpu" in found["deploy_onnxruntime_cuda"]["fix"]


def test_kernels_need_a_cuda_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths(monkeypatch, {**ALL, "torch": "2.13.0+cpu"})
    assert found["gpu_kernels"]["missing"] == ["a CUDA build of torch"]
    assert "TORCH_BUILD=cuda" in found["gpu_kernels"]["fix"]
    assert found["export"]["ok"]


def test_a_server_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths(monkeypatch, ALL, server=False)
    assert found["serve"]["ok"] and not found["server"]["ok"]
    assert found["server"]["fix"] == "fssdeploy serve --setup"


def test_a_part_that_is_not_there_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paths(monkeypatch, ALL, absent=("fssdeploy.serving.client",))
    assert not found["serve"]["ok"]
    assert "not in fssdeploy" in found["serve"]["missing"][0]


def test_an_onnxruntime_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = doctor.diagnose().data["paths"]["deploy_onnxruntime_cpu"]
    assert not path["ok"]
    assert "ONNX Runtime that loads" in path["missing"][0]
    assert path["fix"] == "pip install fssdeploy"


def test_every_extra_in_a_command_exists() -> None:
    from importlib.metadata import metadata

    extras = set(metadata("fssdeploy").get_all("Provides-Extra") or [])
    for way in doctor.WAYS:
        if "[" in way.install:
            assert set(way.install.partition("[")[2].partition("]")[0].split(",")) <= extras


def test_here_deployment_works_and_the_text_says_so() -> None:
    report = doctor.diagnose()
    assert report.data["paths"]["deploy_onnxruntime_cpu"]["ok"]
    assert report.data["packages"]["numpy"]
    assert report.data["machine"]["cores"] >= 1
    for way in doctor.WAYS:
        assert way.title in report.text(width=200)


@pytest.mark.parametrize(
    ("answer", "gpu"),
    [("echo 'Card, 1024 MiB, 1.2'", "Card, 1024 MiB, 1.2"), ("exit 9", None), ("true", None)],
    ids=["a GPU", "driver without a GPU", "no answer"],
)
def test_the_gpu_is_what_nvidia_smi_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, gpu: str | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor.diagnose().data["machine"]["gpu"] == gpu


def test_asking_loads_nothing_heavy_and_prints_json() -> None:
    code = (
        "import sys; from fssdeploy.doctor import diagnose; print(diagnose().json());"
        f"sys.exit(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert set(json.loads(done.stdout)) == {"title", "notes", "machine", "packages", "paths"}
