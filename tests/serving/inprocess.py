"""The server's Python backend and its ensembles, as far as our models use them, inside the test's own process.

Not the server: what it accepts is tested against the real one. This shows quickly, everywhere, what the models compute.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format

from fssdeploy.serving.configs import protobuf
from fssdeploy.serving.models import answers


class TritonError(Exception):
    """Text and code of an error, as the server's class has them."""

    INVALID_ARG, NOT_FOUND, UNAVAILABLE, INTERNAL = "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class Request:
    tensors: Mapping[str, np.ndarray]


@dataclass
class Response:
    outputs: Sequence[Tensor] = ()
    error: TritonError | None = None


def backend_module() -> ModuleType:
    """A stand-in for ``triton_python_backend_utils``."""
    module = ModuleType("triton_python_backend_utils")

    def get_input(request: Request, name: str) -> Tensor | None:
        return Tensor(name, request.tensors[name]) if name in request.tensors else None

    class Logger:
        log_error = staticmethod(print)

    parts = {"TritonError": TritonError, "Tensor": Tensor, "InferenceResponse": Response, "Logger": Logger}
    module.__dict__.update(parts, get_input_tensor_by_name=get_input)
    return module


@contextmanager
def python_backend() -> Iterator[None]:
    """Inside, models can be loaded and run, whatever NumPy the tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", backend_module())
        patch.setattr(answers, "check_numpy", lambda: None)
        yield


class Host:
    """Runs the models of a repository; call it inside `python_backend`."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._loaded: dict[str, Any] = {}

    def config(self, model: str) -> Any:
        return text_format.Parse((self.repository / model / "config.pbtxt").read_text(), protobuf().ModelConfig())

    def versions(self, model: str) -> list[int]:
        return sorted(int(each.name) for each in (self.repository / model).iterdir() if each.name.isdecimal())

    def load(self, model: str) -> Any:
        """The newest version of a model, anew."""
        config = self.config(model)
        version = str(self.versions(model)[-1])
        folder = self.repository / model
        if config.backend == "onnxruntime":
            from fssdeploy.serving.models.graph import OnnxRuntimeBackend as kind
        else:
            spec = importlib.util.spec_from_file_location(f"{model}_{version}", folder / version / "model.py")
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kind = module.TritonPythonModel
        as_json = json_format.MessageToDict(
            config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        loaded = kind()
        loaded.initialize(
            {
                "model_config": json.dumps(as_json),
                "model_name": model,
                "model_instance_name": f"{model}_0",
                "model_repository": str(folder),
                "model_version": version,
            }
        )
        self._loaded[model] = loaded
        return loaded

    def execute(self, model: str, *requests: Mapping[str, np.ndarray]) -> list[Response]:
        """The answers to requests that arrive together."""
        loaded = self._loaded.get(model) or self.load(model)
        return list(loaded.execute([Request(request) for request in requests]))

    def infer(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one request to a model or an ensemble. Raises TritonError."""
        config = self.config(model)
        if config.platform == "ensemble":
            return self._ensemble(config, inputs)
        (answer,) = self.execute(model, inputs)
        if answer.error:
            raise answer.error
        return {tensor.name: tensor.array for tensor in answer.outputs}

    def _ensemble(self, config: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = dict(inputs)
        waiting = list(config.ensemble_scheduling.step)
        while waiting:
            step = next(step for step in waiting if set(step.input_map.values()) <= set(known))
            waiting.remove(step)
            outputs = self.infer(step.model_name, {name: known[tensor] for name, tensor in step.input_map.items()})
            known |= {tensor: outputs[name] for name, tensor in step.output_map.items()}
        return {output.name: known[output.name] for output in config.output}
