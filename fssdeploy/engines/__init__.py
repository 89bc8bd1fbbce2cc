"""Runtimes behind one interface (fssdeploy.protocol.Engine); each is imported only when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fssdeploy.errors import InputError, MachineError
from fssdeploy.protocol import Engine, StageSpec

RUNTIMES = ("onnxruntime", "openvino")
MAX_THREADS = 1024  # far beyond any use; the runtimes would try to start any number


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """InputError for a number of threads that no runtime can be given; None stands for a default."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError("threads", f"{threads} threads cannot be used", "", f"Give 1 to {MAX_THREADS}.")


def open_engine(
    runtime: str, graphs: Mapping[str, Path], specs: Mapping[str, StageSpec], *, threads: int | None = None
) -> Engine:
    """An engine over ONNX files, one per stage; graphs are opened when first run.

    InputError for an unknown runtime or a bad thread count, MachineError if the runtime is not installed.
    """
    check_threads(threads)
    count = threads or available_cores()
    try:
        if runtime == "onnxruntime":
            from fssdeploy.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(graphs, specs, count)
        if runtime == "openvino":
            from fssdeploy.engines.openvino import OpenVinoEngine

            return OpenVinoEngine(graphs, specs, count)
    except ImportError as error:
        extra = "fssdeploy[openvino]" if runtime == "openvino" else "fssdeploy"
        raise MachineError(
            "runtime_missing", f"runtime '{runtime}' is not installed", str(error), f"Run: pip install '{extra}'"
        ) from error
    raise InputError("runtime_unknown", f"there is no runtime '{runtime}'", "", f"Choose from: {', '.join(RUNTIMES)}.")
