"""Triton, if it is there: what kernels are written with, and why they cannot run where they cannot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    MISSING = None
except ImportError as error:  # the CPU build of PyTorch comes without it
    triton, tl = None, None
    MISSING = f"Triton cannot be imported ({error})"

# Kernels then run on tensors of the CPU, slowly: for tests. Triton reads the variable when a kernel is defined.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

# Asynchronous copies and bfloat16 in the matrix units begin here (Ampere).
OLDEST_CAPABILITY = (8, 0)
LARGEST_INDEX = 2**31 - 1


class UnsupportedError(Exception):
    """A kernel cannot take these arguments; the reference does. The message names the cause."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton."""
    return triton.jit(function) if triton is not None else function


def obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of this device, or None if they can."""
    if MISSING:
        return MISSING
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"there are no kernels for the device {device.type}"
    return _gpu_obstacle(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _gpu_obstacle(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        found, needed = (f"{major}.{minor}" for major, minor in (capability, OLDEST_CAPABILITY))
        return f"{name} has compute capability {found}, kernels need {needed}"
    compiler = os.environ.get("CC")
    if not (shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (CC, gcc, clang) to build its launchers"
    return None


def require_int32(**sizes: int) -> None:
    """UnsupportedError if an index into a tensor of so many elements does not fit in 32 bits."""
    for name, size in sizes.items():
        if size > LARGEST_INDEX:
            raise UnsupportedError(f"{name} has {size} elements, more than 32-bit indices reach")


def aligned(tensor: torch.Tensor) -> bool:
    """Whether address (bytes) and all strides but the last (elements) are multiples of 16, and the last stride is 1.

    Kernels compiled ahead of time promise that to the compiler, which then copies 16 bytes at a time.
    """
    strides = tensor.stride()
    return tensor.data_ptr() % 16 == 0 and strides[-1] == 1 and all(stride % 16 == 0 for stride in strides[:-1])


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must convert this dtype before it computes: Triton's interpreter computes bfloat16 wrongly."""
    return INTERPRETED and dtype == torch.bfloat16


def packed(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """The tensor as kernels read it: contiguous, at an address that is a multiple of 16, its last dimension filled up
    with zeros to a multiple of `multiple`. The tensor itself where it is so already.
    """
    if missing := -tensor.shape[-1] % multiple:
        tensor = torch.nn.functional.pad(tensor, (0, missing))
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
