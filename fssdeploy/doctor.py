"""What this machine has, which ways of working it therefore offers, and the one command that gets each missing one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fssdeploy import __version__
from fssdeploy.engines import available_cores
from fssdeploy.report import Report, Table

# Distribution -> the module it brings. Only onnxruntime is ever imported here; "installed" does not mean "importable".
PACKAGES = {
    "numpy": "numpy",
    "pillow": "PIL",
    "pycocotools": "pycocotools",
    "safetensors": "safetensors",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "openvino": "openvino",
    "torch": "torch",
    "torchvision": "torchvision",
    "triton": "triton",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "scikit-image": "skimage",
    "tensorrt": "tensorrt",
    "cupy-cuda13x": "cupy",
    "tritonclient": "tritonclient",
}


@dataclass(frozen=True)
class Way:
    """One way of working: the part of fssdeploy that does it, the packages and the hardware it needs."""

    name: str
    title: str
    part: str
    packages: tuple[str, ...]
    install: str
    gpu: bool = False
    provider: str = ""
    server: bool = False  # needs a Triton Inference Server


WAYS = (
    Way(
        "deploy_onnxruntime_cpu",
        "deploy on ONNX Runtime, CPU",
        "fssdeploy.engines.onnxruntime",
        ("numpy", "pillow", "pycocotools", "safetensors"),
        "pip install fssdeploy",
        provider="CPUExecutionProvider",
    ),
    Way(
        "deploy_onnxruntime_cuda",
        "deploy on ONNX Runtime, CUDA",
        "fssdeploy.engines.onnxruntime",
        ("onnxruntime-gpu",),
        # Both distributions write into the same folder, so the one with CUDA has to be written last.
        "pip install --force-reinstall --no-deps onnxruntime-gpu",
        gpu=True,
        provider="CUDAExecutionProvider",
    ),
    Way(
        "deploy_openvino",
        "deploy on OpenVINO",
        "fssdeploy.engines.openvino",
        ("openvino",),
        "pip install 'fssdeploy[openvino]'",
    ),
    Way(
        "export",
        "export",
        "fssdeploy.export.onnx",
        ("torch", "onnx", "onnxscript"),
        "pip install 'fssdeploy[export]'",
    ),
    Way("train", "train", "fssdeploy.training", ("torch",), "pip install 'fssdeploy[train]'"),
    Way("tensorrt", "TensorRT", "fssdeploy.export.tensorrt", ("tensorrt",), "pip install 'fssdeploy[gpu]'", gpu=True),
    Way(
        "serve",
        "repositories and clients",
        "fssdeploy.serving.client",
        ("tritonclient",),
        "pip install 'fssdeploy[serve]'",
    ),
    Way("server", "run a server", "fssdeploy.serving.server", (), "fssdeploy serve --setup", server=True),
    Way(
        "gpu_kernels",
        "GPU kernels",
        "fssdeploy.kernels.dispatch",
        ("torch", "triton"),
        "pip install 'fssdeploy[gpu,export]'",
        gpu=True,
    ),
)


def diagnose() -> Report:
    """Look at the machine and the environment; nothing is changed and nothing heavy is imported.

    `data` has ``machine``, ``packages`` (version or None by distribution) and ``paths``: by name a dict of ``ok``,
    ``missing`` (list of text) and ``fix``, empty where no command helps (no GPU, a part that this version lacks).
    """
    machine = _machine()
    packages = {name: _installed(name, module) for name, module in PACKAGES.items()}
    providers, broken = _providers()
    paths = {way.name: _check(way, packages, providers, broken, machine["gpu"]) for way in WAYS}

    ways = [[way.title, paths[way.name]["ok"], "; ".join(paths[way.name]["missing"]) or None] for way in WAYS]
    installed = [[name, found or "not installed"] for name, found in packages.items()]
    notes = [f"{way.title}: {fix}" for way in WAYS if (fix := paths[way.name]["fix"])]
    return Report(
        "fssdeploy doctor",
        machine,
        [Table("what works", ["path", "ok", "missing"], ways), Table("packages", ["package", "version"], installed)],
        ["To get what is missing:", *notes] if notes else [],
        {"machine": machine, "packages": packages, "paths": paths},
    )


def _check(
    way: Way, packages: Mapping[str, str | None], providers: tuple[str, ...], broken: str, gpu: str | None
) -> dict[str, Any]:
    """Whether one way works, what it lacks, and the command that gets it."""
    if not _has_module(way.part):
        return {"ok": False, "missing": [f"not in fssdeploy {__version__}"], "fix": ""}
    if way.gpu and not gpu:
        return {"ok": False, "missing": ["an NVIDIA GPU that nvidia-smi can see"], "fix": ""}
    missing = [name for name in way.packages if not packages[name]]
    if way.provider and way.provider not in providers:
        missing.append(broken or f"{way.provider} in ONNX Runtime")
    if way.server and not _has_server():
        missing.append("tritonserver on PATH, or its private environment")
    fix = way.install if missing else ""
    if way.gpu and "torch" in way.packages and (packages["torch"] or "").endswith("+cpu"):
        missing.append("a CUDA build of torch")
        fix = "make setup TORCH_BUILD=cuda"
    return {"ok": not missing, "missing": missing, "fix": fix}


def _has_server() -> bool:
    """Whether `fssdeploy serve` would find a server."""
    from fssdeploy.serving.environment import locate

    return shutil.which("tritonserver") is not None or locate() is not None


def _installed(distribution: str, module: str) -> str | None:
    """The version of a distribution whose module is there to be found, without importing it."""
    try:
        return version(distribution) if _has_module(module) else None
    except PackageNotFoundError:
        return None


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package above it is not there
        return False


def _providers() -> tuple[tuple[str, ...], str]:
    """The execution providers of the installed ONNX Runtime, and why there are none."""
    try:
        import onnxruntime
    except ImportError as error:
        return (), f"ONNX Runtime that loads ({error})"
    return tuple(onnxruntime.get_available_providers()), ""


def _machine() -> dict[str, Any]:
    return {
        "fssdeploy": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu(),
    }


def _cpu_name() -> str:
    """The processor's name; Linux keeps it in a file, elsewhere Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    """Memory of the machine in GiB, where the system says so."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def _gpu() -> str | None:
    """Name, memory and driver of the NVIDIA GPUs, None if there is none."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return None
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(line.strip() for line in answer.splitlines() if line.strip()) or None
