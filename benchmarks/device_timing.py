"""Microseconds of a call on a GPU: captured in a CUDA graph over inputs that no cache holds, contestants in turns.

A graph removes what Python and the launches cost, which differs from caller to caller. On a CPU the same is timed by
the clock, so that all of it runs in tests.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

Call = Callable[..., Any]
Arguments = Sequence[Any]

# A sample is at least so long: events resolve about half a microsecond, starting a graph takes about ten.
SAMPLE_SECONDS = 2e-3
# Sets of inputs together hold so many times the cache, so that none is left of a set when its turn comes again.
BEYOND_CACHE = 3
MOST_SETS = 32
# Backends and compilers settle within a few calls.
WARM_UP = 3
GEMM_SIDE = 8192
COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over the rounds; without `graph` what launching costs counts."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int
    graph: bool
    peak_mib: float | None = None


class Run(Protocol):
    """A call that is ready to be timed."""

    graph: bool
    peak_mib: float | None

    def seconds(self) -> float:
        """Time of one call, the mean over the sets of inputs, measured once."""
        ...


class Clock:
    """The device of a machine without GPU: calls are timed one after the other."""

    name = "cpu"
    cache_bytes = 0

    def prepare(self, call: Call, sets: Sequence[Arguments], *, graph: bool = True) -> Run:
        """A run of `call` over `sets`."""
        call(*sets[0])
        return _ClockRun(call, sets)


@dataclass
class _ClockRun:
    call: Call
    sets: Sequence[Arguments]
    graph: bool = False
    peak_mib: float | None = None

    def seconds(self) -> float:
        start = time.perf_counter()
        for arguments in self.sets:
            self.call(*arguments)
        return (time.perf_counter() - start) / len(self.sets)


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name: str = properties.name
        self.cache_bytes: int = properties.L2_cache_size

    def prepare(self, call: Call, sets: Sequence[Arguments], *, graph: bool = True) -> Run:
        """A run of `call` over `sets`; `graph=False` for calls that wait for the device between their steps."""
        return _GpuRun(call, sets, graph)


class _GpuRun:
    def __init__(self, call: Call, sets: Sequence[Arguments], graph: bool) -> None:
        self.call, self.sets, self.graph = call, sets, graph
        self.peak_mib: float | None = self._warm_up()
        if graph:
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured):
                # Kept while capturing: every call then writes to memory of its own.
                kept = [call(*arguments) for arguments in sets]
            del kept
        self.repeats = 1
        self.seconds()  # the first replay loads the graph
        self.repeats = max(1, math.ceil(SAMPLE_SECONDS / (self.seconds() * len(sets))))

    def _warm_up(self) -> float:
        """Compile and load everything on a stream of its own, as captures demand; MiB that one call needs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(WARM_UP):
                self.call(*self.sets[index % len(self.sets)])
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.call(*self.sets[0])
            torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(self.repeats):
            if self.graph:
                self.captured.replay()
            else:
                for arguments in self.sets:
                    self.call(*arguments)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / self.repeats / len(self.sets)


Device = Clock | Gpu


def set_count(input_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of `input_bytes` to rotate through."""
    return min(MOST_SETS, max(2, math.ceil(BEYOND_CACHE * cache_bytes / max(1, input_bytes))))


def in_turns(runs: Mapping[str, Run], rounds: int, until: float = math.inf) -> dict[str, Timing]:
    """Time all `runs` in `rounds` rounds, each starting with another run, until time.monotonic() is `until`.

    A slow moment of the machine so meets all alike. At least one round is made.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn and time.monotonic() > until:
            break
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            seconds[name].append(runs[name].seconds())
    return {name: _timing(seconds[name], runs[name]) for name in names}


def _timing(seconds: Sequence[float], run: Run) -> Timing:
    micros = sorted(value * 1e6 for value in seconds)
    last = len(micros) - 1
    return Timing(
        median_us=statistics.median(micros),
        low_us=micros[round(last / 4)],
        high_us=micros[round(3 * last / 4)],
        rounds=len(micros),
        graph=run.graph,
        peak_mib=run.peak_mib,
    )


def ceilings(device: Device, *, side: int = GEMM_SIDE, copy_bytes: int = COPY_BYTES, rounds: int = 7) -> dict[str, Any]:
    """What the device reaches at best: TFLOP/s of a large matrix product by dtype, GB/s of a copy (read + written).

    On random numbers: zeros need less power and run faster.
    """
    place = "cuda" if isinstance(device, Gpu) else "cpu"
    runs: dict[str, Run] = {}
    work: dict[str, float] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        pair = [torch.randn(side, side, device=place).to(dtype) for _ in range(2)]
        runs[_name(dtype)] = device.prepare(torch.mm, [pair])
        work[_name(dtype)] = 2 * side**3 / 1e12
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    runs["copy"] = device.prepare(lambda: target.copy_(source), [()])
    work["copy"] = 2 * copy_bytes / 1e9
    timings = in_turns(runs, rounds)
    rates = {name: work[name] / (timing.median_us * 1e-6) for name, timing in timings.items()}
    return {
        "matrix_tflops": {name: rate for name, rate in rates.items() if name != "copy"},
        "copy_gbs": rates["copy"],
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "matrix_side": side,
        "copy_bytes": copy_bytes,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
