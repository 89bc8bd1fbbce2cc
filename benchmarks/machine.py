"""What a measurement needs to know of the machine: its name, its matrix peak, and how busy others keep it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from fssdeploy.engines import available_cores


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu_name(),
        "instructions": _vector_instructions(),
        "cores": available_cores(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def busy_seconds() -> float | None:
    """CPU seconds that all processes together have used since boot; None where the system does not say."""
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, *_ = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def group_seconds(group: int) -> float:
    """CPU seconds that the living processes of a process group have used; 0 where the system does not say."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def matrix_peak(seconds: float = 1.0) -> float:
    """Best float32 matrix product of this moment in GFLOP/s, over the shapes of a ViT-B and a square one."""
    import torch

    best = 0.0
    for rows, inner, columns in ((1370, 768, 3072), (1370, 3072, 768), (2048, 2048, 2048)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        stop = time.perf_counter() + seconds / 3
        while time.perf_counter() < stop:
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start) / 1e9)
    return best


def peak_memory_mib() -> float:
    """Largest resident size of this process so far. Not from getrusage, whose figure survives an exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_info().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _vector_instructions() -> list[str]:
    flags = next((line for line in _cpu_info().splitlines() if line.startswith("flags")), "").split()
    return [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile") if flag in flags
    ]
