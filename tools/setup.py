"""Make `.venv` with the `fssdeploy` command in it, editable, with everything that development, export and tests need.

Run it through `make setup`; it needs only the standard library. What is not obvious, and why it is done here:

- torch comes first and alone, because pip's default on Linux is a CUDA build of about 2.7 GB; a machine without an NVIDIA
  GPU gets the CPU build where one can be had.
- sam2 is a source package that asks for "torch" in its isolated build, which would fetch the newest CUDA torch just to
  read its metadata. It is built against the torch already installed, without its CUDA extension.
- A constraints file in `.venv` pins torch from then on, for this script and for every later pip in that environment.

Settings (environment): TORCH_BUILD=cpu|cuda chooses the build, TORCH_INDEX=URL is a package index for torch alone.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = VENV / "constraints.txt"
EXTRAS = "export,train,openvino,dev"

CPU_SIZE = "about 190 MB to download, 750 MB on disk"
CUDA_SIZE = "about 2.7 GB to download with its CUDA libraries, several times the CPU build on disk"
REST_SIZE = "about 290 MB to download, 870 MB on disk"


def pin(package: str) -> str:
    """The release that pyproject.toml pins for `package` (read by pattern: Python 3.10 has no TOML reader)."""
    found = re.search(rf'"{re.escape(package)}==([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"setup: pyproject.toml does not pin {package} with '=='")
    return found[1]


def wanted_build(choice: str, system: str, gpu: bool) -> str:
    """ "cpu" or "cuda" where the two differ (Linux), "ordinary" elsewhere: there the default wheel has no CUDA libraries."""
    if choice not in ("", "cpu", "cuda"):
        raise SystemExit(f"setup: TORCH_BUILD={choice} is not one of cpu, cuda")
    if choice:
        return choice
    if system != "Linux":
        return "ordinary"
    return "cuda" if gpu else "cpu"


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers (a driver without a GPU does not count)."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([str(tool), "-L"], capture_output=True, check=False).returncode == 0


def installed(package: str) -> str:
    """The version of `package` in `.venv`, empty if it is not there."""
    code = (
        "import importlib.metadata as m, sys\ntry: print(m.version(sys.argv[1]))\nexcept m.PackageNotFoundError: pass"
    )
    return subprocess.run([PYTHON, "-c", code, package], capture_output=True, text=True, check=True).stdout.strip()


def run(*command: str | Path, env: dict[str, str] | None = None) -> bool:
    """Run a command, shown before it starts; true when it succeeded."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    return subprocess.run(words, env={**os.environ, **(env or {})}, cwd=ROOT, check=False).returncode == 0


def pip(*arguments: str | Path, env: dict[str, str] | None = None) -> bool:
    return run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments, env=env)


def must(done: bool, what: str) -> None:
    if not done:
        raise SystemExit(
            f"setup: {what} failed; the command and its message are above. 'make setup' goes on from here."
        )


def pip_offers(requirement: str) -> bool:
    """Whether pip as configured here (index, find-links) lists exactly this release, local part included."""
    name, version = requirement.split("==")
    listing = subprocess.run(
        [PYTHON, "-m", "pip", "index", "versions", name], capture_output=True, text=True, check=False
    ).stdout
    return version in re.split(r"[\s,]+", listing)


def install_torch(torch: str, vision: str, build: str, index: str) -> None:
    """Install torch and torchvision of these releases (`torch==…`), each as small as this machine allows."""
    if index:
        must(pip("--index-url", index, torch, vision), "installing torch from TORCH_INDEX")
    elif build != "cpu":
        must(pip(torch, vision), "installing torch")
    elif pip_offers(f"{torch}+cpu"):
        must(pip(f"{torch}+cpu"), "installing torch")
        # The ordinary torchvision cannot be imported beside a CPU torch; only original code needs it, the package does not.
        must(pip("--no-deps", vision), "installing torchvision")
    else:
        print(
            "setup: pip finds no CPU build of torch here; asking uv, which knows where PyTorch keeps them.", flush=True
        )
        uv = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, "--torch-backend", "cpu"]
        if not (pip("uv") and run(*uv, torch, vision)):
            print(f"setup: no CPU build of torch can be reached; taking the ordinary build: {CUDA_SIZE}.", flush=True)
            must(pip(torch, vision), "installing torch")


def hold_torch() -> None:
    """Pin torch and torchvision as they are now, for every later pip in this environment."""
    pins = [f"{package}=={installed(package)}" for package in ("torch", "torchvision")]
    CONSTRAINTS.write_text("\n".join(pins) + "\n", encoding="utf-8")
    # As a file URL, since pip splits this setting at blanks.
    (VENV / "pip.conf").write_text(f"[install]\nconstraint = {CONSTRAINTS.as_uri()}\n", encoding="utf-8")


def main() -> None:
    start = time.monotonic()
    choice, index = os.environ.get("TORCH_BUILD", ""), os.environ.get("TORCH_INDEX", "")
    build = wanted_build(choice, platform.system(), has_gpu())
    torch, vision, sam2 = (f"{name}=={pin(name)}" for name in ("torch", "torchvision", "sam2"))

    if not PYTHON.exists():
        print(f"setup: making {VENV} with Python {platform.python_version()}", flush=True)
        must(run(sys.executable, "-m", "venv", VENV), "making the environment")
    present = installed("torch")
    keep = bool(installed("torchvision")) and present.partition("+")[0] == pin("torch") and not (choice or index)
    if keep:
        print(f"setup: torch {present} is there and stays (TORCH_BUILD=cpu|cuda would replace it)", flush=True)
    else:
        source = f"from {index}" if index else {"cpu": CPU_SIZE, "cuda": CUDA_SIZE}.get(build, "the default build")
        print(f"setup: downloads {torch} ({build}): {source}", flush=True)
        print(
            f"setup: and the other packages of fssdeploy[{EXTRAS}]: {REST_SIZE}; what is there already is kept",
            flush=True,
        )
        if present:
            # A constraint of an earlier run, or the same release in the other build, would stand in the way.
            CONSTRAINTS.write_text("", encoding="utf-8")
            must(run(PYTHON, "-m", "pip", "uninstall", "--yes", "--quiet", "torch", "torchvision"), "removing torch")
        install_torch(torch, vision, build, index)
    hold_torch()

    if not installed("sam2"):
        must(pip("setuptools>=77"), "installing setuptools")
        no_cuda = {"SAM2_BUILD_CUDA": "0"}
        must(pip("--no-build-isolation", "--no-deps", sam2, env=no_cuda), "building sam2")
    must(pip("--editable", f".[{EXTRAS}]"), "installing fssdeploy")
    print(
        f"setup: ready in {time.monotonic() - start:.0f} s, torch {installed('torch')}: {PYTHON.parent / 'fssdeploy'}"
    )


if __name__ == "__main__":
    main()
