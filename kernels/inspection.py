"""What the compiler made of a kernel: resources and instructions of a cubin, parameters of a PTX text.

Reads them with the tools that Triton brings (cuobjdump, nvdisasm, ptxas), so neither CUDA nor a GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The newest matrix instruction of each architecture: mma, wgmma (90) and tcgen05 (100).
MATRIX_FAMILY = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# What instructions are counted as, by their whole name.
COUNTED = {
    **{family: rf"{family}\b.*" for family in ("HMMA", "HGMMA", "UTCHMMA")},
    "copies": r"LDGSTS\b.*\.128\b.*|UTMALDG\b.*",  # asynchronous, 16 bytes or whole tiles
    "spills": r"(LDL|STL)\b.*",
}
# Loads of 2 bytes: what copies become where the compiler was promised no alignment.
NARROW = r"LDG\b.*\.U16\b.*"
# Triton appends two pointers to every kernel (scratch memory of the grid and of its profiler).
HIDDEN_PARAMETERS = 2

# "/*0a40*/  @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;": the predicate may be absent.
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_LABEL = re.compile(r"(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, bytes of stack and of local memory; and how often each kind of COUNTED occurs.

    `narrow_loads` counts loads of 2 bytes in the loops that copy, or in the whole kernel if none of its loops does.
    """

    registers: int
    stack: int
    local: int
    instructions: Mapping[str, int]
    narrow_loads: int


def inspect(cubin: bytes) -> Resources:
    """Resources and instruction counts of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = {name: int(value) for name, value in _USAGE.findall(_output("cuobjdump", "-res-usage", file.name))}
        sass = _output("nvdisasm", "-c", "-ndf", file.name)
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"], count(sass), narrow_loads(sass))


def count(sass: str) -> dict[str, int]:
    """How many instructions of a disassembled kernel are of each kind of COUNTED."""
    names = _instructions(sass.splitlines())
    return {kind: _matching(pattern, names) for kind, pattern in COUNTED.items()}


def narrow_loads(sass: str) -> int:
    """Loads of 2 bytes in the innermost loops that copy, or in the whole kernel if none of its loops does."""
    lines = sass.splitlines()
    copying = [loop for loop in _loops(lines) if _matching(COUNTED["copies"], _instructions(lines[loop]))]
    inner = [
        loop
        for loop in copying
        if not any(loop.start <= other.start and other.stop <= loop.stop and other != loop for other in copying)
    ]
    return sum(_matching(NARROW, _instructions(lines[loop])) for loop in inner or [slice(None)])


def _instructions(lines: Iterable[str]) -> list[str]:
    return [found[1] for line in lines if (found := _INSTRUCTION.match(line))]


def _matching(pattern: str, names: Iterable[str]) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _loops(lines: Sequence[str]) -> Iterator[slice]:
    """The lines of each loop: from a label to a branch back to it."""
    labels: dict[str, int] = {}
    for place, line in enumerate(lines):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = place
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            yield slice(labels[branch[1]], place + 1)


def parameters(ptx: str, entry: str) -> list[str]:
    """The parameter declarations of a kernel, in order."""
    found = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(([^)]*)\)", ptx)
    return [line.strip() for line in found[1].split(",") if line.strip()] if found else []


def without_hidden_parameters(ptx: str, entry: str) -> str:
    """The text without the parameters that Triton appended, for launchers that pass only the declared ones."""
    head, body = re.split(rf"(?<=\.entry {re.escape(entry)}\()", ptx, maxsplit=1)
    declared = parameters(ptx, entry)[:-HIDDEN_PARAMETERS]
    return head + "\n\t" + ",\n\t".join(declared) + "\n" + body[body.index(")") :]


def assembler_error(ptx: str, architecture: int) -> str:
    """What ptxas says against the text for this architecture; empty if it assembles."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        # Unoptimised: it is quicker, and the question is only whether the text is valid.
        command = [get_ptxas(architecture).path, "-O0", f"--gpu-name={sm_arch_from_capability(architecture)}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    return (done.stderr.strip() or f"ptxas returned {done.returncode}").splitlines()[0] if done.returncode else ""


def _output(tool: str, *arguments: str) -> str:
    from triton import knobs

    command = [getattr(knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
