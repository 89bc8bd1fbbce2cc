"""Checks that every operation makes of its arguments, before any implementation sees them."""

from __future__ import annotations

import torch

from fssdeploy.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse(operation: str, what: str, why: str = "", fix: str = "") -> None:
    """Raise InputError (kernel_input) that names the operation."""
    raise InputError("kernel_input", f"fssdeploy::{operation}: {what}", why, fix)


def require_rank(operation: str, **ranks: tuple[torch.Tensor, int]) -> None:
    """InputError unless every tensor has its number of dimensions: `query=(query, 2)`."""
    for name, (tensor, rank) in ranks.items():
        if tensor.dim() != rank:
            refuse(operation, f"{name} has shape {tuple(tensor.shape)}", f"it needs {rank} dimensions")


def require_alike(operation: str, **tensors: torch.Tensor) -> None:
    """InputError unless all tensors are floating, of one dtype and on one device."""
    first, reference = next(iter(tensors.items()))
    if reference.dtype not in FLOATS:
        refuse(operation, f"{first} is {reference.dtype}", "it takes floating point numbers")
    for name, tensor in tensors.items():
        if tensor.device != reference.device:
            why = f"{first} is on {reference.device}, {name} on {tensor.device}"
            refuse(operation, "tensors on different devices", why, "Move them to one device.")
        if tensor.dtype != reference.dtype:
            why = f"{first} is {reference.dtype}, {name} is {tensor.dtype}"
            refuse(operation, "tensors of different dtypes", why, "Convert them to one dtype.")


def require_equal(operation: str, what: str, **extents: int | torch.SymInt) -> None:
    """InputError unless all `extents`, such as `query=C, support=C`, are equal; `what` says of what they are."""
    first = next(iter(extents.values()))
    if any(extent != first for extent in extents.values()):  # no int(): it would fix a traced size
        found = ", ".join(f"{name} has {extent}" for name, extent in extents.items())
        refuse(operation, f"the tensors differ in {what}", found)


def require_some(operation: str, **extents: int | torch.SymInt) -> None:
    """InputError if one of the named extents is zero."""
    for name, extent in extents.items():
        if extent == 0:
            refuse(operation, f"there are no {name}", "at least one is needed")
