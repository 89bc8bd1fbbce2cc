"""One stage as an ONNX graph, run by the same engine as on the local path.

`OnnxRuntimeBackend` stands in for NVIDIA's backend of that name where a server has none, and holds a config to its
rules; `PythonGraph` is for repositories that say backend "python" and needs no such backend anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fssdeploy.engines.onnxruntime import OnnxRuntimeEngine
from fssdeploy.errors import IntegrityError
from fssdeploy.pipeline import run_in_chunks
from fssdeploy.protocol import BATCH, StageSpec, TensorSpec
from fssdeploy.serving.models.answers import Settings, error_response, required, response
from fssdeploy.serving.names import GRAPH
from fssdeploy.serving.rules import DTYPES, Declared, graph_problems


class PythonGraph:
    """A graph of any batch behind a config of any max_batch_size: one with a fixed batch runs row by row."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the graph. Raises IntegrityError if it does not fit the config."""
        self._settings = settings = Settings.read(args)
        path = settings.version_folder / GRAPH
        self._max_batch = int(settings.config["max_batch_size"])
        inputs, outputs = (_declared(settings.config[side]) for side in ("input", "output"))
        threads = settings.number("intra_op_thread_count")
        self._engine = OnnxRuntimeEngine({settings.name: path}, {}, threads)
        graph = self._engine.declared(settings.name)
        problems = self._problems(inputs, outputs, graph)
        if problems:
            raise IntegrityError(
                "config_refused",
                f"the config of model '{settings.name}' does not fit its graph",
                "; ".join(problems),
                "Write the repository again.",
            )
        self._spec = StageSpec(
            settings.name, _specs(inputs, graph, self._max_batch), _specs(outputs, graph, self._max_batch)
        )
        self._engine.specs[settings.name] = self._spec

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer for each request. The requests of a batch run together; if that fails, each by itself."""
        answers: list[Any] = [None] * len(requests)
        rows: list[dict[str, np.ndarray]] = []
        readable = []
        for index, request in enumerate(requests):
            try:
                rows.append({tensor.name: required(request, tensor.name) for tensor in self._spec.inputs})
                readable.append(index)
            except Exception as error:
                answers[index] = error_response(error)
        for index, answer in zip(readable, self._run(rows), strict=True):
            answers[index] = answer
        return answers

    def _problems(self, inputs: Sequence[Declared], outputs: Sequence[Declared], graph: StageSpec) -> list[str]:
        """Why this config cannot be served; empty if it can."""
        batch = self._max_batch if graph.inputs and graph.inputs[0].shape[:1] == (BATCH,) else 0
        if self._max_batch and not batch:  # row by row: the config's rows are the graph's only one
            inputs, outputs = (
                [Declared(each.name, each.data_type, (1, *each.dims)) for each in side] for side in (inputs, outputs)
            )
        return graph_problems(batch, inputs, outputs, graph)

    def _run(self, requests: Sequence[Mapping[str, np.ndarray]]) -> list[Any]:
        if len(requests) > 1 and self._max_batch:
            try:
                return self._together(requests)
            except Exception:
                return [answer for request in requests for answer in self._run([request])]
        answers = []
        for request in requests:
            try:
                rows = max(len(array) for array in request.values())
                answers.append(response(run_in_chunks(self._engine, self._spec, request, self._max_batch or rows)))
            except Exception as error:
                answers.append(error_response(error))
        return answers

    def _together(self, requests: Sequence[Mapping[str, np.ndarray]]) -> list[Any]:
        joined = {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}
        outputs = run_in_chunks(self._engine, self._spec, joined, self._max_batch)
        ends = np.cumsum([len(next(iter(request.values()))) for request in requests])
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [response({name: part[index] for name, part in parts.items()}) for index in range(len(requests))]


class OnnxRuntimeBackend(PythonGraph):
    """The stand-in: what the real backend would refuse at load time, this refuses, too."""

    def _problems(self, inputs: Sequence[Declared], outputs: Sequence[Declared], graph: StageSpec) -> list[str]:
        return graph_problems(self._max_batch, inputs, outputs, graph)


def _declared(tensors: Sequence[Mapping[str, Any]]) -> list[Declared]:
    return [
        Declared(each["name"], each["data_type"], tuple(map(int, each["dims"])), bool(each.get("optional")))
        for each in tensors
    ]


def _specs(tensors: Sequence[Declared], graph: StageSpec, max_batch: int) -> tuple[TensorSpec, ...]:
    """The config's tensors as a spec that a request is checked against; the batch is the graph's."""
    first = {each.name: each.shape[0] for each in (*graph.inputs, *graph.outputs)}
    return tuple(
        TensorSpec(each.name, DTYPES[each.data_type], (first[each.name], *(each.dims if max_batch else each.dims[1:])))
        for each in tensors
    )
