"""The operations as pytest-benchmark cases on whatever device there is; `make bench` saves and compares them.

What runs is what FSSDEPLOY_KERNELS decides; the extra_info of a case says what ran and why. Launches count here;
benchmarks/kernels.py times without them and against other formulations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fssdeploy.benchmarks.operation_cases import Draw, Problem, as_dtype, typical
from fssdeploy.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def _cases() -> list[Any]:
    """Every operation, on a GPU in all its forms; elsewhere all forms run the same reference."""
    return [
        pytest.param(problem, form, id=f"{problem.operation}-{form}")
        for problem in typical()
        for form in list(problem.calls)[: None if DEVICE == "cuda" else 1]
    ]


@pytest.mark.parametrize(("problem", "form"), _cases())
def test_operation(benchmark: Any, problem: Problem, form: str) -> None:
    inputs = as_dtype(problem.inputs(Draw(DEVICE, seed=0)), DTYPE)

    def call() -> None:
        problem.calls[form](*inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    choice = dispatch.taken().get(problem.operation)
    benchmark.extra_info.update(
        sizes=dict(problem.sizes),
        dtype=str(DTYPE),
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        implementation=choice.implementation if choice else "reference",
        why=choice.reason if choice else "",
    )
