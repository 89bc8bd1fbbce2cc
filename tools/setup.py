"""Make `.venv` with the `fssdeploy` command in it, editable, and with all that development, export and tests need.

Run it through `make setup`; it needs only the standard library. What is not obvious, and why it is done here:

- torch comes first and alone: on Linux pip's default is a CUDA build of about 2.7 GB, and a machine without an NVIDIA
  GPU gets the CPU build where one can be had.
- sam2 is a source package that asks for "torch" in its isolated build, which would fetch the newest CUDA torch just to
  read its metadata. It is built against the torch already installed, without its CUDA extension.
- A constraints file in `.venv` holds torch from then on, for this script and for every later pip in that environment.

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
from collections.abc import Mapping
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - whichever Python the user has runs this file
    raise SystemExit("setup: Python 3.11 or later is needed; name one: make setup PYTHON=python3.12")
import tomllib  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = VENV / "constraints.txt"
EXTRAS = "export,train,openvino,serve,kernels,dev"

SIZES = {
    "cpu": "about 190 MB to download, 0.8 GB on disk",
    "cuda": "about 2.7 GB to download with its CUDA libraries, 4.6 GB on disk",
    "ordinary": "the default build of this platform",
}
REST_SIZE = "about 470 MB to download, 1.8 GB on disk"


def pin(package: str) -> str:
    """The release that an extra in pyproject.toml pins for `package`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = [line for lines in extras.values() for line in lines if line.startswith(f"{package}==")]
    if not found:
        raise SystemExit(f"setup: pyproject.toml does not pin {package} with '=='")
    return str(found[0].partition("==")[2])


def wanted_build(choice: str, system: str, gpu: bool) -> str:
    """Which torch: "cpu", "cuda", or "ordinary" where the default wheel brings no CUDA libraries (not Linux)."""
    if choice not in ("", "cpu", "cuda"):
        raise SystemExit(f"setup: TORCH_BUILD={choice} is not one of cpu, cuda")
    if system != "Linux":
        return "ordinary"
    return choice or ("cuda" if gpu else "cpu")


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers; a driver tool without a GPU does not count."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([str(tool), "-L"], capture_output=True, check=False).returncode == 0


def installed(package: str) -> str:
    """The version of `package` in `.venv`, empty if it is not there."""
    code = "import importlib.metadata as m; print(next((d.version for d in m.distributions(name={!r})), ''))"
    command = [str(PYTHON), "-c", code.format(package)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> bool:
    """Run a command, shown before it starts; true when it succeeded."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    return subprocess.run(words, env={**os.environ, **(env or {})}, cwd=ROOT, check=False).returncode == 0


def pip(*arguments: str, env: Mapping[str, str] | None = None) -> bool:
    return run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments, env=env)


def must(done: bool, what: str) -> None:
    if not done:
        raise SystemExit(f"setup: {what} failed, see above. Once that is mended, 'make setup' goes on from here.")


def pip_offers(requirement: str) -> bool:
    """Whether pip as configured here (index, find-links) lists exactly this release, local part included."""
    name, version = requirement.split("==")
    command = [str(PYTHON), "-m", "pip", "index", "versions", name]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return version in re.split(r"[\s,]+", listing)


def install_torch(torch: str, vision: str, build: str, index: str) -> None:
    """Install the requirements `torch` and `vision` (``torch==...``), as small as this machine allows."""
    default = torch.replace("==", "===")  # "==" would also take a CPU build, "2.13.0+cpu", where pip is offered one
    if index:
        must(pip("--index-url", index, torch, vision), "installing torch from TORCH_INDEX")
    elif build != "cpu":
        must(pip(default, vision), "installing torch")
    elif pip_offers(f"{torch}+cpu"):
        must(pip(f"{torch}+cpu"), "installing torch")
        # The ordinary torchvision cannot be imported beside a CPU torch. Only others' original code needs it.
        must(pip("--no-deps", vision), "installing torchvision")
    else:
        say("pip finds no CPU build of torch here; asking uv, which knows where PyTorch keeps them")
        uv: list[str | Path] = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, "--torch-backend", "cpu"]
        if not (pip("uv") and run(*uv, torch, vision)):
            say(f"no CPU build of torch can be reached; taking the default build: {SIZES['cuda']}")
            must(pip(default, vision), "installing torch")


def hold_torch() -> None:
    """Pin torch and torchvision as they are now, for every later pip in this environment."""
    pins = [f"{package}==={installed(package)}" for package in ("torch", "torchvision")]
    CONSTRAINTS.write_text("\n".join(pins) + "\n", encoding="utf-8")
    # As a file URL, since pip splits this setting at blanks.
    (VENV / "pip.conf").write_text(f"[install]\nconstraint = {CONSTRAINTS.as_uri()}\n", encoding="utf-8")


def main() -> None:
    start = time.monotonic()
    choice, index = os.environ.get("TORCH_BUILD", ""), os.environ.get("TORCH_INDEX", "")
    build = wanted_build(choice, platform.system(), has_gpu())
    torch, vision, sam2 = (f"{name}=={pin(name)}" for name in ("torch", "torchvision", "sam2"))

    if not PYTHON.exists():
        say(f"making {VENV} with Python {platform.python_version()}")
        must(run(sys.executable, "-m", "venv", VENV), "making the environment")
    present = {name: installed(name) for name in ("torch", "torchvision", "sam2")}
    pinned = all(present[name].partition("+")[0] == pin(name) for name in ("torch", "torchvision"))
    if pinned and not (choice or index):
        say(f"torch {present['torch']} is there and stays; TORCH_BUILD=cpu|cuda would install it anew")
    else:
        say(f"will download {torch}: {f'from {index}' if index else SIZES[build]}")
        say(f"and the packages of fssdeploy[{EXTRAS}] that are not there yet: {REST_SIZE} for all of them")
        if present["torch"]:
            # The pin of an earlier run, or the same release in the other build, would stand in the way.
            CONSTRAINTS.write_text("", encoding="utf-8")
            must(run(PYTHON, "-m", "pip", "uninstall", "--yes", "torch", "torchvision"), "removing the torch before")
        install_torch(torch, vision, build, index)
    hold_torch()

    if present["sam2"] != pin("sam2"):
        must(pip("setuptools>=77"), "installing setuptools")
        must(pip("--no-build-isolation", "--no-deps", sam2, env={"SAM2_BUILD_CUDA": "0"}), "building sam2")
    must(pip("--editable", f".[{EXTRAS}]"), "installing fssdeploy")
    say(f"ready in {time.monotonic() - start:.0f} s: torch {installed('torch')}, {PYTHON.parent / 'fssdeploy'}")


if __name__ == "__main__":
    main()
