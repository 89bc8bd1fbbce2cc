"""One kernel with everything fixed that the compiler must know: what is compiled ahead of time, gated and shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Compute capability x 10 of the architectures that kernels are shipped for.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class ShippedKernel:
    """A configuration that some launcher uses.

    `signature` lists all arguments in order with Triton's type ("*fp16", "i32", "fp32", "constexpr"); `constexprs` the
    values of the constant ones. `aligned` names the arguments that the launcher guarantees to be multiples of 16
    (pointers in bytes, strides in elements). `grid` has three formulas over argument and constant names, as C
    expressions with cdiv(a, b). `matrix` tells that the kernel must use the matrix units, `copies` how many 16-byte
    asynchronous copies it must at least contain; `exceptions` says, for an architecture, why another instruction than
    its newest matrix family is accepted there.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]
    grid: tuple[str, str, str]
    num_warps: int
    num_stages: int
    matrix: bool = True
    copies: int = 1
    exceptions: Mapping[int, str] = field(default_factory=dict)
