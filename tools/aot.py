"""Run the ahead-of-time gate of the GPU kernels under every version of Triton that we support (`make aot`).

The version in `.venv` is used as it is, any other is installed into `build/triton-VERSION` (about 200 MB to download).
A version that cannot be had is skipped, and the last line says so; if none can, that is a failure.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of torch 2.13, which we pin, and of torch 2.11, which servers with older drivers have.
VERSIONS = ("3.7.1", "3.6.0")


def installed() -> str:
    """The version of Triton in this environment, empty if there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def fetch(version: str, folder: Path) -> bool:
    """Have this Triton in `folder`; whether that succeeded. A half-finished installation is not mistaken for one."""
    if folder.exists():
        return True
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    command += ["--target", str(unfinished), f"triton=={version}"]
    print("+", *command, flush=True)
    if subprocess.run(command, check=False).returncode:
        return False
    unfinished.rename(folder)
    return True


def environment(version: str) -> dict[str, str] | None:
    """Environment variables under which Python imports this Triton; None if it cannot be had."""
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version == installed():
        return compiled
    folder = ROOT / "build" / f"triton-{version}"
    return {**compiled, "PYTHONPATH": str(folder)} if fetch(version, folder) else None


def main() -> int:
    worst, skipped = 0, []
    for version in VERSIONS:
        variables = environment(version)
        if variables is None:
            skipped.append(version)
            continue
        out = ROOT / "build" / "aot" / f"triton-{version}"
        command = [sys.executable, "-m", "fssdeploy.kernels.aot", "--out", str(out)]
        print("+", *command, flush=True)
        worst = max(worst, subprocess.run(command, env=variables, check=False).returncode)
    for version in skipped:
        print(f"THE KERNELS WERE NOT COMPILED WITH TRITON {version}: it could not be installed", flush=True)
    return worst or (4 if len(skipped) == len(VERSIONS) else 0)


if __name__ == "__main__":
    sys.exit(main())
