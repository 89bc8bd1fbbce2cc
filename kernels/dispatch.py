"""Which implementation of an operation runs, and why.

`FSSDEPLOY_KERNELS` is `reference` (plain PyTorch), `triton` (kernels wherever they can run) or `auto`, the default:
what was faster when `benchmarks/kernels.py` measured both on this very model of GPU, at the nearest size of the same
dtype. What nobody measured runs as reference.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from fssdeploy.errors import InputError
from fssdeploy.kernels import runtime

VARIABLE = "FSSDEPLOY_KERNELS"
MODES = ("auto", "reference", "triton")
# Written by benchmarks/kernels.py: {device name: {operation: [Measurement as an object]}}.
TABLE = Path(__file__).with_name("measured.json")
# A measurement speaks for sizes up to this factor away in every dimension.
REACH = 2.0

Implementation = Literal["reference", "triton"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Choice:
    """What runs, and the sentence that says why."""

    implementation: Implementation
    reason: str


@dataclass(frozen=True)
class Measurement:
    """Microseconds of both implementations at one size; `reference_us` is the best without our kernels."""

    dtype: str
    sizes: Mapping[str, int]
    reference_us: float
    triton_us: float

    def distance(self, sizes: Mapping[str, int]) -> float:
        """The largest factor between a size of the measurement and one of `sizes`; 1 where all are equal."""
        if set(sizes) != set(self.sizes):
            return math.inf
        return math.exp(max(abs(math.log(max(sizes[name], 1) / max(size, 1))) for name, size in self.sizes.items()))


class KernelWarning(RuntimeWarning):
    """A kernel was wanted and the reference ran."""


_taken: dict[str, Choice] = {}
# Compilations that failed are not tried again: they take seconds each time.
_broken: dict[tuple[str, torch.device, torch.dtype], Choice] = {}


def taken() -> dict[str, Choice]:
    """What ran when each operation was last called in this process, and why."""
    return dict(_taken)


def mode() -> str:
    """The value of FSSDEPLOY_KERNELS; InputError (kernels_mode) if it is none of MODES."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in MODES:
        why = f"it takes one of {', '.join(MODES)}"
        raise InputError("kernels_mode", f"{VARIABLE} is {value!r}", why, f"Unset {VARIABLE}, or set one of them.")
    return value


def choose(operation: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> Choice:
    """Reference or kernel for `operation` on tensors of this device and dtype with these `sizes` (name -> extent)."""
    wanted = mode()
    if wanted == "reference":
        return Choice("reference", f"{VARIABLE}=reference")
    hindrance = runtime.obstacle(device)
    if wanted == "triton":
        return Choice("reference", hindrance) if hindrance else Choice("triton", f"{VARIABLE}=triton")
    if hindrance:
        return Choice("reference", hindrance)
    if device.type != "cuda":
        return Choice("reference", "the interpreter is for tests: auto never takes it")
    return _faster(operation, torch.cuda.get_device_name(device), dtype, sizes)


def run(
    operation: str,
    like: torch.Tensor,
    sizes: Mapping[str, int],
    reference: Callable[[], Result],
    kernel: Callable[[], Result] | None,
) -> Result:
    """The result of the implementation that `choose` takes for tensors such as `like`.

    Where a kernel was asked for and cannot run, one KernelWarning an operation and cause says so. `kernel` is None for
    operations that are linear algebra and have none.
    """
    if kernel is None:
        choice = Choice("reference", "linear algebra: this operation has no kernel of its own")
    else:
        key = operation, like.device, like.dtype
        choice = choose(*key, sizes)
        if choice.implementation == "triton":
            choice = _broken.get(key, choice)
        if choice.implementation == "triton":
            try:
                with torch.cuda.device_of(like):  # Triton launches on the current device
                    result = kernel()
            except runtime.UnsupportedError as error:
                choice = Choice("reference", str(error))
                _warn_once(operation, choice.reason)
            except _compilation_failures() as error:
                said = getattr(error, "error_message", None) or str(error)
                choice = Choice("reference", f"the kernel cannot be compiled: {said.strip().splitlines()[0][:200]}")
                _broken[key] = choice
                _warn_once(operation, choice.reason)
            else:
                _taken[operation] = choice
                return result
        elif mode() == "triton" or _wins_elsewhere(like.device, choice):
            _warn_once(operation, choice.reason)
    _taken[operation] = choice
    return reference()


def _wins_elsewhere(device: torch.device, choice: Choice) -> bool:
    """Whether `auto` falls back on a GPU for a reason that the user can mend: no Triton, no compiler, too old a GPU."""
    return device.type == "cuda" and choice.implementation == "reference" and choice.reason == runtime.obstacle(device)


def _faster(operation: str, name: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> Choice:
    measured = [entry for entry in _table().get(name, {}).get(operation, ()) if entry.dtype == str(dtype).split(".")[1]]
    if not measured:
        return Choice("reference", f"nothing was measured on {name} for {dtype}")
    nearest = min(measured, key=lambda entry: entry.distance(sizes))
    if nearest.distance(sizes) > REACH:
        return Choice("reference", f"no size within a factor of {REACH:g} of {dict(sizes)} was measured on {name}")
    times = f"{nearest.triton_us:.1f} us against {nearest.reference_us:.1f} us at {dict(nearest.sizes)} on {name}"
    if nearest.triton_us < nearest.reference_us:
        return Choice("triton", f"the kernel took {times}")
    return Choice("reference", f"the kernel took {times}")


@cache
def _table() -> dict[str, dict[str, tuple[Measurement, ...]]]:
    if not TABLE.exists():
        return {}
    devices: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(TABLE.read_text())
    return {
        device: {name: tuple(Measurement(**entry) for entry in entries) for name, entries in operations.items()}
        for device, operations in devices.items()
    }


def _compilation_failures() -> tuple[type[Exception], ...]:
    if runtime.triton is None:
        return ()
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # The last: a C compiler that cannot build Triton's launchers, for want of Python's headers for example.
    return CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError


@cache
def _warn_once(operation: str, reason: str) -> None:
    warnings.warn(f"fssdeploy::{operation} runs as reference: {reason}", KernelWarning, stacklevel=2)
