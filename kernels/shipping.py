"""Compiled kernels as files: cubins and PTX (or fatbins), with manifests that say how each is launched.

`kernels.json` holds everything; `kernels.txt` holds what a launcher needs, one record a line, for the driver in C++.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fssdeploy.errors import MachineError
from fssdeploy.kernels.inspection import HIDDEN_PARAMETERS
from fssdeploy.kernels.shipped_kernel import ShippedKernel

SCHEMA = 1
# What a grid formula can call; the driver in C++ computes the same.
GRID_FUNCTIONS = ("cdiv", "max", "min")


@dataclass(frozen=True)
class Image:
    """One kernel compiled for one target (`sm_90`, or `ptx`: text for every architecture from `architecture` on).

    `shared` counts bytes of dynamic shared memory, `tensor_memory` columns, `scratch` bytes.
    """

    target: str
    architecture: int
    entry: str
    cubin: bytes
    ptx: str
    shared: int
    tensor_memory: int
    scratch: int

    @property
    def content(self) -> bytes:
        """What is shipped: the text for `ptx`, else the cubin."""
        return self.ptx.encode() if self.target == "ptx" else self.cubin

    def facts(self) -> dict[str, Any]:
        """Sizes and the hash of the content."""
        return {"shared": self.shared, "bytes": len(self.content), "sha256": _sha256(self.content)}


def grid_names(kernel: ShippedKernel) -> set[str]:
    """Arguments and constants that the grid formulas of a kernel use."""
    return {name for formula in kernel.grid for name in re.findall(r"[A-Za-z_]\w*", formula)} - set(GRID_FUNCTIONS)


def ship(
    folder: Path,
    kernels: Mapping[str, ShippedKernel],
    images: Mapping[str, Sequence[Image]],
    triton: str,
    fatbinary: str | None = None,
) -> None:
    """Write the images of all kernels and the manifests into `folder`; with `fatbinary`, one fatbin for each kernel.

    Raises MachineError (fatbinary_failed).
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, kernel in kernels.items():
        files = {image.target: f"{name}.{_suffix(image)}" for image in images[name]}
        for image in images[name]:
            (folder / files[image.target]).write_bytes(image.content)
        if fatbinary:
            _pack(fatbinary, folder, name, images[name], files)
            files = dict.fromkeys(files, f"{name}.fatbin")
        entries.append(_entry(kernel, images[name], files, folder))
    manifest = {"schema": SCHEMA, "triton": triton, "hidden_parameters": HIDDEN_PARAMETERS, "kernels": entries}
    (folder / "kernels.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (folder / "kernels.txt").write_text(_records(entries), encoding="utf-8")


def _suffix(image: Image) -> str:
    return "ptx" if image.target == "ptx" else f"{image.target}.cubin"


def _entry(kernel: ShippedKernel, images: Sequence[Image], files: Mapping[str, str], folder: Path) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "entry": images[0].entry,
        "num_warps": kernel.num_warps,
        "grid": list(kernel.grid),
        "parameters": [
            {"name": name, "type": kind, "multiple_of": 16 if name in kernel.aligned else 1}
            for name, kind in kernel.signature.items()
            if kind != "constexpr"
        ],
        "constexprs": {name: _plain(value) for name, value in kernel.constexprs.items()},
        "images": [
            {
                "target": image.target,
                "cc": image.architecture,
                "shared": image.shared,
                "file": files[image.target],
                "sha256": _sha256((folder / files[image.target]).read_bytes()),
            }
            for image in images
        ],
    }


def _plain(value: object) -> int | float | str:
    return value if isinstance(value, int | float | str) else str(value)


def _records(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"fssdeploy-kernels {SCHEMA}"]
    for entry in entries:
        lines.append(f"kernel {entry['name']} {entry['entry']} {entry['num_warps']}")
        lines += [f"grid {formula.replace(' ', '')}" for formula in entry["grid"]]
        lines += [f"parameter {each['name']} {each['type']} {each['multiple_of']}" for each in entry["parameters"]]
        lines += [f"constant {name} {_number(value)}" for name, value in entry["constexprs"].items()]
        lines += [f"image {each['target']} {each['cc']} {each['shared']} {each['file']}" for each in entry["images"]]
    return "\n".join(lines) + "\n"


def _number(value: int | float | str) -> int | float | str:
    return int(value) if isinstance(value, bool) else value


def _pack(program: str, folder: Path, name: str, images: Sequence[Image], files: Mapping[str, str]) -> None:
    """One fatbin of the files, which are then removed."""
    parts = [
        f"--image3=kind={'ptx' if image.target == 'ptx' else 'elf'},sm={_machine(image)},file={files[image.target]}"
        for image in images
    ]
    command = [program, f"--create={name}.fatbin", "--64", *parts]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise MachineError("fatbinary_failed", f"{program} could not pack {name}", said.strip()) from error
    for file in files.values():
        (folder / file).unlink()


def _machine(image: Image) -> str:
    # Triton compiles for exactly these architectures from 90 on ("a").
    return f"{image.architecture}a" if image.architecture >= 90 and image.target != "ptx" else str(image.architecture)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
