"""Is what an operation computes on a device right? Against float64 on the same device, forward and backward.

Three properties of every case: errors within the limits below, every element written (memory comes poisoned), and two
runs that agree bit for bit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from fssdeploy.benchmarks.operation_cases import Call, Draw, Problem, as_dtype
from fssdeploy.kernels import dispatch

# By dtype: ||error|| / ||exact||, and the largest error over the root mean square of the exact values. Half precision
# rounds to 2^-11, bfloat16 to 2^-8, operands of a second product are rounded once more, and cuBLAS may add partial sums
# in half precision; float32 products must not be TF32 ones, which err by 3e-4. A problem may multiply all by `slack`.
LIMITS = {"float16": (4e-3, 4e-2), "bfloat16": (1.5e-2, 1.5e-1), "float32": (1e-5, 2e-4)}
# By how much another choice may be better than the one of a maximum, over the root mean square of the maxima.
REGRET = 1e-4


@contextmanager
def implementation(mode: str) -> Iterator[None]:
    """Meanwhile FSSDEPLOY_KERNELS is `mode`."""
    with mock.patch.dict(os.environ, {dispatch.VARIABLE: mode}):
        yield


@contextmanager
def watched() -> Iterator[list[dict[str, Any]]]:
    """Meanwhile, note what the dispatcher is asked for and what it takes."""
    asked: list[dict[str, Any]] = []
    run = dispatch.run

    def noted(operation: str, like: torch.Tensor, sizes: Any, reference: Any, kernel: Any) -> Any:
        result = run(operation, like, sizes, reference, kernel)
        choice = dispatch.taken()[operation]
        entry = {"operation": operation, "dtype": _name(like.dtype), "sizes": dict(sizes)}
        asked.append({**entry, "took": choice.implementation, "why": choice.reason})
        return result

    with mock.patch.object(dispatch, "run", noted):
        yield asked


@contextmanager
def poisoned() -> Iterator[None]:
    """Meanwhile memory that is allocated and not written holds NaN, or the largest integer."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def check(problem: Problem, dtype: str, device: str) -> dict[str, Any]:
    """What was found of every form of the operation: `passed`, and by form the `errors` of outputs and gradients."""
    inputs = as_dtype(problem.inputs(Draw(device, seed=1)), getattr(torch, dtype))
    forms = {form: _check_form(problem, call, inputs, dtype) for form, call in problem.calls.items()}
    return {"passed": all(found["passed"] for found in forms.values()), "forms": forms}


def _check_form(problem: Problem, call: Call, inputs: Sequence[torch.Tensor], dtype: str) -> dict[str, Any]:
    with implementation("triton" if problem.has_kernel else "reference"):
        with watched() as asked, poisoned():
            outputs, upstream, gradients = _run(call, inputs, problem.differentiable)
        first, second = (_run(call, inputs, problem.differentiable) for _ in range(2))
    repeatable = all(map(torch.equal, (*first[0], *first[2]), (*second[0], *second[2])))
    hindered = [entry["why"] for entry in asked if problem.has_kernel and entry["took"] != "triton"]

    exact_inputs = as_dtype(inputs, torch.float64)
    exact_call, regret = problem.plain, 0.0
    if problem.exact_choice:
        # Which of two nearly equal maxima wins may differ: a choice is judged by its value, gradients follow it.
        exact_call, regret = problem.exact_choice(exact_inputs, outputs)
    exact, _, exact_gradients = _run(exact_call, exact_inputs, problem.differentiable, upstream)

    compared = [
        *(
            (f"output {index}", *pair)
            for index, pair in enumerate(zip(_floating(outputs), _floating(exact), strict=True))
        ),
        *((f"gradient {index}", *pair) for index, pair in enumerate(zip(gradients, exact_gradients, strict=True))),
    ]
    errors = {}
    for name, found, wanted in compared:
        # What a kernel accumulates and returns in float32 must be as good as that; gradients pass through the dtype.
        returned = problem.has_kernel and name.startswith("output")
        limits = LIMITS[_name(found.dtype) if returned else dtype]
        relative, largest = distance(found, wanted)
        most, most_anywhere = (limit * problem.slack for limit in limits)
        passed = relative <= most and largest <= most_anywhere  # NaN is neither
        errors[name] = {"relative": relative, "largest": largest, "limits": [most, most_anywhere], "passed": passed}
    within = all(error["passed"] for error in errors.values())
    return {
        "passed": within and repeatable and not hindered and regret <= REGRET,
        "errors": errors,
        "regret": regret,
        "chosen_well": regret <= REGRET,
        "repeatable": repeatable,
        "hindered": hindered[0] if hindered else None,
    }


def distance(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """||found - exact|| / ||exact||, and max |found - exact| over the root mean square of `exact`; NaN never passes.

    Infinities must stand at the same places; they are not counted further. Of an exact zero the absolute errors.
    """
    found = found.to(torch.float64)
    if found.shape != exact.shape or not torch.equal(found.isinf(), exact.isinf()):
        return float("nan"), float("nan")
    finite = ~exact.isinf()
    found, exact = found[finite], exact[finite]
    if found.numel() == 0:
        return 0.0, 0.0
    error, norm = (found - exact).norm().item(), exact.norm().item()
    scale = norm / found.numel() ** 0.5
    return error / (norm or 1.0), (found - exact).abs().max().item() / (scale or 1.0)


def _run(
    call: Call,
    inputs: Sequence[torch.Tensor],
    differentiable: Sequence[int],
    upstream: Sequence[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, the gradients that were sent in at the floating ones, and what came back for `differentiable` inputs."""
    arguments = list(inputs)
    for index in differentiable:
        arguments[index] = inputs[index].detach().clone().requires_grad_()
    outputs = as_tuple(call(*arguments))
    reached = [output for output in outputs if output.requires_grad]
    upstream = upstream if upstream is not None else upstream_gradients(reached)
    gradients: Sequence[torch.Tensor] = ()
    if differentiable:
        wanted = [arguments[index] for index in differentiable]
        sent = [gradient.to(output.dtype) for gradient, output in zip(upstream, reached, strict=True)]
        gradients = torch.autograd.grad(reached, wanted, sent)
    return [output.detach() for output in outputs], list(upstream), list(gradients)


def upstream_gradients(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Random gradients of the outputs' shapes and dtypes, the same at every call; 0 where an output is infinite."""
    gradients = []
    for seed, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(seed)
        gradient = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
        gradients.append(gradient.masked_fill(output.detach().isinf(), 0))
    return gradients


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """One tensor or several, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _floating(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
