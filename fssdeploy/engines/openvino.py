"""Stages on OpenVINO (CPU)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Importing OpenVINO reports the import to its maker, unless this package cannot be found (a silent stand-in is used).
# Nothing here may use the network at run time.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

from fssdeploy.engines.failures import graph_unreadable, run_failed  # noqa: E402
from fssdeploy.protocol import StageSpec  # noqa: E402


class OpenVinoEngine:
    """One compiled model per stage, compiled when first run."""

    name = "openvino"
    # Without this hint OpenVINO computes in bfloat16 on CPUs that have it: measurably off, and slower without AMX.
    precision = "f32"

    def __init__(self, graphs: Mapping[str, Path], specs: Mapping[str, StageSpec], threads: int) -> None:
        self.specs = dict(specs)
        self._graphs = dict(graphs)
        self._threads = threads
        self._core = ov.Core()
        self._models: dict[str, ov.CompiledModel] = {}

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of one stage by name; inputs must follow its spec."""
        spec = self.specs[stage]
        spec.check(inputs)
        model = self._model(stage)
        try:
            results = model({name: np.ascontiguousarray(array) for name, array in inputs.items()})
        except RuntimeError as error:
            raise run_failed(stage, "OpenVINO", error) from error
        return {tensor.name: np.array(results[tensor.name]) for tensor in spec.outputs}

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            "version": ov.__version__,
            "inference_precision": self.precision,
            "threads": self._threads,
        }

    def _model(self, stage: str) -> ov.CompiledModel:
        if stage not in self._models:
            hints = {
                "INFERENCE_PRECISION_HINT": self.precision,
                "INFERENCE_NUM_THREADS": self._threads,
                "PERFORMANCE_HINT": "LATENCY",
            }
            path = self._graphs[stage]
            try:
                self._models[stage] = self._core.compile_model(path, "CPU", hints)
            except RuntimeError as error:
                raise graph_unreadable(path, "OpenVINO", error) from error
        return self._models[stage]
