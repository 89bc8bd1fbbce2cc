"""The CMake build: configures anywhere, says what it leaves out, and what it can build passes its tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("g++")), reason="the compiled parts need cmake and g++"
)
# A machine without any of the means that parts need: an empty value is not searched for.
BARE = ("-DFSSDEPLOY_FATBINARY=", "-DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON", "-DFSSDEPLOY_ORT_INCLUDE=")


def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if name not in ("ONNXRUNTIME_HOME", "CUDA_HOME")}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def configure(build: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return call("cmake", "-S", ROOT, "-B", build, f"-DFSSDEPLOY_PYTHON={sys.executable}", *settings)


def test_a_bare_machine_says_what_each_part_needs(tmp_path: Path) -> None:
    done = configure(tmp_path, *BARE)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "skipped: it needs" in line]
    assert len(lines) == 3
    for line, part, need in zip(
        lines, ("FATBIN", "CPU_KERNELS", "ORT_OPS"), ("fatbinary", "Eigen", "CPU"), strict=True
    ):
        assert f"FSSDEPLOY_{part}" in line
        assert need in line


@pytest.mark.parametrize("part", ["FSSDEPLOY_FATBIN", "FSSDEPLOY_CPU_KERNELS", "FSSDEPLOY_ORT_OPS"])
def test_a_part_that_is_insisted_on_must_be_possible(part: str, tmp_path: Path) -> None:
    done = configure(tmp_path, *BARE, f"-D{part}=ON")
    assert done.returncode != 0
    assert f"{part} is ON, but it needs" in " ".join(done.stderr.split())


def test_the_headers_of_onnx_runtime_are_asked_for(tmp_path: Path) -> None:
    """Their part is left out for nothing else, and the line names the setting."""
    (tmp_path / "eigen").mkdir()
    (tmp_path / "eigen" / "Eigen3Config.cmake").write_text("add_library(Eigen3::Eigen INTERFACE IMPORTED)\n")
    settings = [setting for setting in BARE if "Eigen3" not in setting]
    done = configure(tmp_path / "build", *settings, f"-DEigen3_DIR={tmp_path / 'eigen'}")
    assert done.returncode == 0, done.stderr
    assert "FSSDEPLOY_CPU_KERNELS  built" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "skipped" in line and "FSSDEPLOY_ORT_OPS" in line]
    assert "onnxruntime_c_api.h" in line
    assert "-DFSSDEPLOY_ORT_INCLUDE=" in line


def test_the_driver_launches_what_python_ships(tmp_path: Path) -> None:
    """Neither CUDA nor a GPU: a libcuda of our own writes down what it is asked for."""
    assert configure(tmp_path / "build", *BARE).returncode == 0
    built = call("cmake", "--build", tmp_path / "build", "--parallel", "2")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    tested = call("ctest", "--test-dir", tmp_path / "build", "--no-tests=error", "--output-on-failure")
    assert tested.returncode == 0, tested.stdout

    from fssdeploy.kernels.shipped_kernel import ShippedKernel
    from fssdeploy.kernels.shipping import Image, ship

    kernel = ShippedKernel(
        name="first",
        function=None,
        signature={"values": "*fp16", "count": "i32", "scale": "fp32", "BLOCK": "constexpr", "MODE": "constexpr"},
        constexprs={"BLOCK": 64, "MODE": True},
        aligned=("values",),
        grid=("cdiv(count, BLOCK) * 2", "max(MODE, 1)", "1"),
        num_warps=4,
        num_stages=1,
    )
    images = [
        Image(target, architecture, "entry", b"cubin", "text", shared=64 * 1024, tensor_memory=0, scratch=0)
        for target, architecture in (("sm_80", 80), ("sm_90", 90), ("ptx", 80))
    ]
    ship(tmp_path / "shipped", {"first": kernel}, {"first": images}, "3.7.1")
    folder = tmp_path / "build" / "kernels" / "csrc" / "driver"
    launched = call(folder / "shipped_test", folder / "libfake_cuda.so", tmp_path / "shipped")
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.split() == ["first"]

    (tmp_path / "shipped" / "first.sm_90.cubin").unlink()
    launched = call(folder / "shipped_test", folder / "libfake_cuda.so", tmp_path / "shipped")
    assert launched.returncode != 0
    assert "first.sm_90.cubin cannot be read" in launched.stderr


@pytest.mark.slow
def test_everything_that_this_machine_can_build_passes(tmp_path: Path) -> None:
    assert configure(tmp_path).returncode == 0
    built = call("cmake", "--build", tmp_path, "--parallel", "2")
    assert built.returncode == 0, built.stderr
    tested = call("ctest", "--test-dir", tmp_path, "--no-tests=error", "--output-on-failure")
    assert tested.returncode == 0, tested.stdout
