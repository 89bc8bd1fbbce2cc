"""What every Python model of a repository does the same: read its settings, answer each request, name its errors.

Runs inside the server's Python backend; ``triton_python_backend_utils`` exists only there and is imported only there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fssdeploy import __version__
from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError

VERSION = "fssdeploy"  # the parameter that says which version of this package wrote the repository

# Codes of errors for something that is named well and is not there.
_NOT_FOUND = ("class_unknown", "version_unknown", "bank_missing")

Self = TypeVar("Self")


@dataclass(frozen=True)
class Settings:
    """What the server tells a model when it is loaded.

    `folder` is the model's, `version_folder` that of the version being loaded; `config` is config.pbtxt as JSON and
    `parameters` are its parameters by name.
    """

    name: str
    folder: Path
    version_folder: Path
    config: dict[str, Any]
    parameters: dict[str, str]

    @staticmethod
    def read(args: Mapping[str, str]) -> Settings:
        """From the arguments of a model's ``initialize``. Refuses NumPy 2 and a repository of another version."""
        check_numpy()
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"])
        settings = Settings(args["model_name"], folder, folder / args["model_version"], config, parameters)
        written = parameters.get(VERSION)
        if written != __version__:
            raise IntegrityError(
                "repository_version",
                f"model '{settings.name}' was written by fssdeploy {written}",
                f"the server's environment holds fssdeploy {__version__}",
                "Write the repository again, or set the environment up again.",
            )
        return settings

    def number(self, key: str) -> int:
        """A parameter that is a whole number. Raises IntegrityError."""
        try:
            return int(self.parameters[key])
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                "config_damaged",
                f"the config of model '{self.name}' has no whole number '{key}'",
                f"it says {self.parameters.get(key)!r}",
                "Write the repository again.",
            ) from error


def check_numpy() -> None:
    """With NumPy 2 the Python backend of server 2.51 reads inputs wrongly and returns empty outputs, without a word."""
    if int(np.__version__.split(".")[0]) >= 2:
        raise MachineError(
            "numpy_version",
            f"NumPy {np.__version__} cannot be used in the server's environment",
            "the server's Python backend needs NumPy 1",
            "Run: fssdeploy serve --setup",
        )


def error_text(error: Exception) -> str:
    """The text that a client gets: ``error[code]: what, why, what to do``, from which it can make the error anew."""
    if isinstance(error, FssError):
        return f"error[{error.code}]: {error.line()}"
    text = " ".join(str(error).split())
    return f"error[internal]: an unexpected failure: {type(error).__name__}: {text}"


def triton_error(error: Exception) -> Any:
    """The server's error for any exception: its text and the nearest of the server's codes."""
    import triton_python_backend_utils as pb_utils

    kind = pb_utils.TritonError
    if getattr(error, "code", "") in _NOT_FOUND:
        code = kind.NOT_FOUND
    elif isinstance(error, InputError):
        code = kind.INVALID_ARG
    elif isinstance(error, MachineError):
        code = kind.UNAVAILABLE
    else:
        code = kind.INTERNAL
    return kind(error_text(error), code)


def response(outputs: Mapping[str, np.ndarray]) -> Any:
    """The server's answer with these tensors. Text is given as arrays of objects, each `bytes`."""
    import triton_python_backend_utils as pb_utils

    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])


def error_response(error: Exception) -> Any:
    """The server's answer to a request that failed."""
    import triton_python_backend_utils as pb_utils

    if not isinstance(error, FssError):
        pb_utils.Logger.log_error(error_text(error))
    return pb_utils.InferenceResponse(error=triton_error(error))


def answer_each(
    answer: Callable[[Self, Any], Mapping[str, np.ndarray]],
) -> Callable[[Self, list[Any]], list[Any]]:
    """Make a model's ``execute`` of a method that takes one request and returns its outputs by name.

    Every request gets exactly one answer, and one that fails leaves its neighbours alone: a request without an answer
    would wait for ever.
    """

    @functools.wraps(answer)
    def execute(self: Self, requests: list[Any]) -> list[Any]:
        answers = []
        for request in requests:
            try:
                answers.append(response(answer(self, request)))
            except Exception as error:
                answers.append(error_response(error))
        return answers

    return execute


def input_array(request: Any, name: str) -> np.ndarray | None:
    """One input of a request; None if it is optional and was not sent."""
    import triton_python_backend_utils as pb_utils

    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def required(request: Any, name: str) -> np.ndarray:
    """One input of a request. Raises InputError if it was not sent."""
    array = input_array(request, name)
    if array is None:
        raise InputError("input_missing", f"the input '{name}' is missing", "", "Send it.")
    return array


def files_of(request: Any, name: str, most: int) -> list[bytes]:
    """The elements of a text input that hold files. Raises InputError for one of more than `most` bytes."""
    files = [bytes(element) for element in required(request, name).reshape(-1)]
    for number, file in enumerate(files, 1):
        if len(file) > most:
            raise InputError(
                "request_too_large",
                f"element {number} of '{name}' has {len(file) / 2**20:.1f} MiB",
                f"this server takes {most / 2**20:g} MiB",
                "Compress it, or send a smaller picture.",
            )
    return files
