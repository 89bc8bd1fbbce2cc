"""Compile every shipped kernel ahead of time for every architecture, and hold the results against what we promise.

`python -m fssdeploy.kernels.aot` needs Triton, but neither CUDA nor a GPU. It prints a table, writes `report.json`, and
returns 2 if any kernel fails on any target. With `--ship` the kernels are written out for use without Python.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import ModuleType

from fssdeploy.errors import CheckFailedError, FssError, MachineError
from fssdeploy.kernels import affinity, correlation, inspection, runtime, scma, spectral
from fssdeploy.kernels.gate import TARGETS, Row, gate
from fssdeploy.kernels.shipping import ship

OPERATIONS = (affinity, correlation, spectral, scma)
OUT = Path("build/aot")
NAME_WIDTH = 44


def line(rows: Sequence[Row]) -> str:
    """Of one kernel: registers, KB of shared memory, matrix instructions and 16-byte copies, each target by target."""
    cells = zip(*(_cells(row) for row in rows), strict=True)
    return f"{rows[0].kernel:{NAME_WIDTH}}  {' | '.join('/'.join(column) for column in cells)}"


def _cells(row: Row) -> tuple[str, ...]:
    if row.image is None or row.resources is None:
        return ("-",) * 4
    found = row.resources.instructions
    matrix = sum(found[family] for family in set(inspection.MATRIX_FAMILY.values()))
    numbers = (row.resources.registers, round(row.image.shared / 1024), matrix, found["copies"])
    return tuple(f"{number}{'!' if row.failures else ''}" for number in numbers)


def write_report(rows: Sequence[Row], version: str, path: Path) -> None:
    """JSON: of each kernel and target the failures, resources and sizes."""
    kernels: dict[str, dict[str, object]] = {}
    for row in rows:
        entry: dict[str, object] = {"failures": row.failures}
        if row.image and row.resources:
            entry |= asdict(row.resources) | row.image.facts()
        kernels.setdefault(row.kernel, {})[row.target] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"triton": version, "kernels": kernels}, indent=1) + "\n", encoding="utf-8")


def run(modules: Sequence[ModuleType], workers: int, out: Path, shipped: Path | None, fatbinary: str | None) -> None:
    """Gate, print, report; ship if everything holds. MachineError (triton_missing), CheckFailedError (aot_failed)."""
    if runtime.MISSING or runtime.INTERPRETED:
        why = runtime.MISSING or "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled"
        raise MachineError(
            "triton_missing", "kernels cannot be compiled", why, "Install triton; unset TRITON_INTERPRET."
        )
    import triton

    names = "/".join(target.name for target in TARGETS)
    print(f"{'':{NAME_WIDTH}}  registers | KB of shared memory | matrix instructions | copies, on {names}")
    rows: list[Row] = []
    for _, group in groupby(gate(modules, workers, out / "cache"), key=lambda row: row.kernel):
        of_kernel = list(group)
        print(line(of_kernel), flush=True)
        rows += of_kernel
    write_report(rows, triton.__version__, out / "report.json")
    failed = [row for row in rows if row.failures]
    for row in failed:
        print(f"FAILED {row.kernel} on {row.target}: {'; '.join(row.failures)}")
    print(f"Triton {triton.__version__}: {len(rows) - len(failed)} compiled kernels hold, {len(failed)} fail")
    if failed:
        named = ", ".join(dict.fromkeys(row.kernel for row in failed))
        raise CheckFailedError("aot_failed", f"kernels fail with Triton {triton.__version__}", named)
    if shipped:
        kernels = {kernel.name: kernel for module in modules for kernel in module.shipped()}
        images = {name: [row.image for row in rows if row.kernel == name and row.image] for name in kernels}
        ship(shipped, kernels, images, triton.__version__, fatbinary)
        print(f"shipped to {shipped}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fssdeploy.kernels.aot", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder for report.json and the compiler's cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ship", type=Path, metavar="DIR", help="write cubins, PTX and manifests there")
    parser.add_argument("--fatbinary", metavar="PROGRAM", help="CUDA's fatbinary: ship one file for each kernel")
    given = parser.parse_args(arguments)
    try:
        run(OPERATIONS, given.workers, given.out, given.ship, given.fatbinary)
    except FssError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
