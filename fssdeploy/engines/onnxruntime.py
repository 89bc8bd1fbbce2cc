"""Stages on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# From 1.29 on the official Linux builds report every session to their maker, unless told before the import. Nothing
# here may use the network at run time; who wants the reports sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # noqa: E402

from fssdeploy.engines.failures import graph_unreadable, run_failed  # noqa: E402
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec  # noqa: E402

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}


class OnnxRuntimeEngine:
    """One session per stage, on the CPU (or CUDA where the installed build has it), opened when first run."""

    name = "onnxruntime"

    def __init__(self, graphs: Mapping[str, Path], specs: Mapping[str, StageSpec], threads: int) -> None:
        self.specs = dict(specs)
        self._graphs = dict(graphs)
        self._threads = threads
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        self._providers = [name for name in wanted if name in ort.get_available_providers()]
        self._sessions: dict[str, ort.InferenceSession] = {}

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of one stage by name; inputs must follow its spec."""
        spec = self.specs[stage]
        spec.check(inputs)
        names = [tensor.name for tensor in spec.outputs]
        session = self._session(stage)
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # the runtime's exceptions share no public base class
            raise run_failed(stage, "ONNX Runtime", error) from error

    def declared(self, stage: str) -> StageSpec:
        """What the graph itself says of its inputs and outputs; a dimension without a number is ``"batch"``."""
        session = self._session(stage)

        def tensors(nodes: list[Any]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    node.name,
                    _DTYPES.get(node.type, node.type.removeprefix("tensor(").removesuffix(")")),
                    tuple(dim if isinstance(dim, int) else BATCH for dim in node.shape),
                )
                for node in nodes
            )

        return StageSpec(stage, tensors(session.get_inputs()), tensors(session.get_outputs()))

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self.name,
            "version": ort.__version__,
            "providers": self._providers,
            "threads": self._threads,
        }

    def _session(self, stage: str) -> ort.InferenceSession:
        if stage not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            # Every stage has a thread pool of its own; one that waits by spinning takes the cores from the next stage
            # (two cores, tiny preset: 40 ms a query with spinning, 23 ms without).
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 4  # what goes wrong is raised; as a log it would be said twice
            path = self._graphs[stage]
            try:
                self._sessions[stage] = ort.InferenceSession(path, options, providers=self._providers)
            except Exception as error:  # the runtime's exceptions share no public base class
                raise graph_unreadable(path, "ONNX Runtime", error) from error
        return self._sessions[stage]
