"""Engines of the enrolled path inside the server: one that counts, and one that asks the stage models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fssdeploy.errors import MachineError
from fssdeploy.protocol import Engine, StageSpec
from fssdeploy.serving.names import Names


class CountingEngine:
    """Another engine, with the seconds spent in each stage and how often it ran."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.specs = engine.specs
        self.seconds = dict.fromkeys(engine.specs, 0.0)
        self.counts = dict.fromkeys(engine.specs, 0)
        self._engine = engine

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As the other engine; a run that fails is counted too."""
        start = time.perf_counter()
        try:
            return self._engine.run(stage, inputs)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            self.counts[stage] = self.counts.get(stage, 0) + 1

    def forget(self) -> None:
        """Count from nothing again."""
        self.seconds = dict.fromkeys(self.specs, 0.0)
        self.counts = dict.fromkeys(self.specs, 0)

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()


class TritonEngine:
    """The models `<system>_stage_*` of the server this runs in, called one after the other (business-logic scripting).

    For machines where those models run on a GPU that their instances share.
    """

    name = "triton"

    def __init__(self, system: str, specs: Mapping[str, StageSpec], max_batch: int) -> None:
        self.specs = dict(specs)
        self._models = {stage: Names(system).stage(stage) for stage in specs}
        self._max_batch = max_batch

    def run(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of one stage by name; inputs must follow its spec. MachineError ``stage_failed``."""
        self.specs[stage].check(inputs)
        shared = self.specs[stage].shared
        rows = max(len(array) for name, array in inputs.items() if name not in shared)
        step = rows if shared else self._max_batch if self.specs[stage].free_batch else 1
        parts = [
            self._ask(
                stage,
                {name: array if name in shared else array[start : start + step] for name, array in inputs.items()},
            )
            for start in range(0, rows, step)
        ]
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def describe(self) -> dict[str, Any]:
        return {"runtime": self.name, "models": self._models}

    def _ask(self, stage: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import triton_python_backend_utils as pb_utils

        names = [tensor.name for tensor in self.specs[stage].outputs]
        request = pb_utils.InferenceRequest(
            model_name=self._models[stage],
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise MachineError(
                "stage_failed",
                f"the model '{self._models[stage]}' failed",
                response.error().message(),
                "Look into the server's log.",
            )
        return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names}
