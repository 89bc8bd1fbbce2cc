"""What is timed against what for one case: our operation in all its forms, plain PyTorch, compiled, other rivals."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fssdeploy.benchmarks.device_timing import Device, Run, Timing, in_turns, set_count
from fssdeploy.benchmarks.operation_cases import Call, Case, Draw, as_dtype
from fssdeploy.benchmarks.operation_checks import as_tuple, implementation, upstream_gradients, watched

COMPILED = "compiled"
ROUNDS = 15


class DeviceLostError(Exception):
    """The device answers this process no more: nothing further can be measured in it."""


@dataclass(frozen=True)
class Formulation:
    """One way to compute a case. Operations run as `mode`; `counts` is what an operation must beat (see Rival)."""

    call: Call
    dtype: str
    mode: str | None = None
    counts: bool = False
    compiled: bool = False
    prepare: Callable[..., Sequence[torch.Tensor]] | None = None


def formulations(case: Case, backend: str) -> dict[str, Formulation]:
    """By name. `backend` is that of torch.compile."""
    problem, dtype = case.problem, case.dtype
    found: dict[str, Formulation] = {}
    for form, call in problem.calls.items():
        mode = "triton" if problem.has_kernel else "reference"
        found[form] = Formulation(call, dtype, mode)
    found[f"eager {dtype}"] = Formulation(problem.plain, dtype, counts=True)
    if dtype != "float32":
        found["eager float32"] = Formulation(problem.plain, "float32")
    if problem.graph:
        found[COMPILED] = Formulation(_compile(problem.plain, backend), dtype, counts=True, compiled=True)
    for name, rival in {} if case.training else problem.rivals.items():
        call = _compile(rival.call, backend) if rival.compiled else rival.call
        found[name] = Formulation(call, dtype, None, rival.counts, rival.compiled, rival.prepare)
    return found


def compile_all(case: Case, device: str, backend: str) -> None:
    """Compile what will be timed, for the compilers' caches on the disk."""
    torch.compiler.reset()
    for formulation in formulations(case, backend).values():
        if formulation.compiled:
            _timed_call(case, formulation)(*_arguments(case, formulation, device, seed=0))


def time_case(
    case: Case,
    device: Device,
    *,
    backend: str = "inductor",
    rounds: int = ROUNDS,
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Times of all formulations, taken in turns within about `seconds`, and why some failed.

    `dispatched` lists what the dispatcher was asked for by each of our forms, `counted` the formulations that a kernel
    must beat. DeviceLostError if a formulation breaks the device.
    """
    place = "cpu" if device.name == "cpu" else "cuda"
    until = time.monotonic() + seconds
    torch.compiler.reset()
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    dispatched: dict[str, list[dict[str, Any]]] = {}
    moved = 0
    known = formulations(case, backend)
    for name, formulation in known.items():
        try:
            sets = _sets(case, formulation, place, device.cache_bytes)
            call = _timed_call(case, formulation)
            if formulation.mode:
                with watched() as asked:
                    outputs = as_tuple(call(*sets[0]))
                dispatched[name] = asked
                moved = sum(each.nbytes for each in (*sets[0], *outputs))
                hindered = [entry["why"] for entry in asked if case.problem.has_kernel and entry["took"] != "triton"]
                if hindered:
                    failed[name] = f"the reference ran: {hindered[0]}"
                    continue
            runs[name] = _prepare(device, call, sets, case.problem.graph)
        except Exception as error:  # whatever a compiler or a kernel raises is a finding
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
            _require_device(place, failed[name])
    timings: dict[str, Timing] = in_turns(runs, rounds, until) if runs else {}
    row = {
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "failed": failed,
        "dispatched": dispatched,
        "counted": [name for name, formulation in known.items() if formulation.counts],
        "flops": case.problem.training_flops if case.training else case.problem.flops,
        "bytes": moved,
    }
    del runs
    gc.collect()
    if place == "cuda":
        torch.cuda.empty_cache()
    return row


def _prepare(device: Device, call: Call, sets: Sequence[Sequence[torch.Tensor]], graph: bool) -> Run:
    """Ready to be timed in a graph or, where the call cannot be captured, without one."""
    if graph:
        try:
            return device.prepare(call, sets, graph=True)
        except RuntimeError as error:
            _require_device("cpu" if device.name == "cpu" else "cuda", str(error))
    return device.prepare(call, sets, graph=False)


def _require_device(place: str, after: str) -> None:
    if place == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(after) from error


def _compile(call: Call, backend: str) -> Call:
    compiled: Call = torch.compile(call, dynamic=False, backend=backend)
    return compiled


def _timed_call(case: Case, formulation: Formulation) -> Call:
    """The formulation as it is timed: for training it ends with the gradients of what wants some."""
    call = _forward_and_backward(case, formulation) if case.training else formulation.call
    mode = formulation.mode
    if mode is None:
        return call

    def forced(*arguments: Any) -> Any:
        with implementation(mode):
            return call(*arguments)

    return forced


def _forward_and_backward(case: Case, formulation: Formulation) -> Call:
    wanted = case.problem.differentiable

    def forward_and_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        inputs, upstream = arguments[:-1], arguments[-1]
        output = as_tuple(formulation.call(*inputs))[0]
        return torch.autograd.grad(output, [inputs[index] for index in wanted], upstream)

    return forward_and_backward


def _arguments(case: Case, formulation: Formulation, place: str, seed: int) -> tuple[torch.Tensor, ...]:
    inputs = as_dtype(case.problem.inputs(Draw(place, seed)), getattr(torch, formulation.dtype))
    if not case.training:
        return tuple(formulation.prepare(*inputs)) if formulation.prepare else inputs
    with torch.no_grad():
        output = as_tuple(case.problem.plain(*inputs))[0]
    for index in case.problem.differentiable:
        inputs[index].requires_grad_()
    return *inputs, upstream_gradients([output])[0]


def _sets(case: Case, formulation: Formulation, place: str, cache_bytes: int) -> list[tuple[torch.Tensor, ...]]:
    first = _arguments(case, formulation, place, seed=0)
    count = set_count(sum(tensor.nbytes for tensor in first), cache_bytes)
    return [first, *(_arguments(case, formulation, place, seed) for seed in range(1, count))]
