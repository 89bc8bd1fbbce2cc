"""What the two models of the enrolled path share: a deployment made from their config, warmed up, with its metrics."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fssdeploy.artifact import Artifact, load, system_class
from fssdeploy.deployment import CACHE_BYTES, Deployment
from fssdeploy.engines import available_cores
from fssdeploy.errors import InputError
from fssdeploy.pipeline import CHUNK, StagedSystem
from fssdeploy.serving.models.answers import Settings, input_array, required
from fssdeploy.serving.models.engine import CountingEngine, TritonEngine
from fssdeploy.serving.models.metrics import Metrics

# Metrics follow a request by this time: a message to the server for each of them would make every request 2 % slower.
PUBLISH_SECONDS = 0.2

# What a config need not say.
DEFAULTS = {
    "artifact": "artifact",
    "threads": "0",
    "instances": "1",
    "cache_bytes": str(CACHE_BYTES),
    "max_picture_bytes": str(32 * 2**20),
    "max_pixels": str(40_000_000),
    "max_mask_bytes": str(256 * 2**20),
    "max_batch": str(CHUNK),
    "engine": "session",
}


class EnrolledModel:
    """Base of the server's models that hold an artifact: `<system>_enroll`, `<system>_segment`, of some `<system>`.

    Parameters of the config, all optional: `artifact` (folder inside the version), `bank` (folder, relative to the
    model's; with FSSDEPLOY_BANK in the environment, the folder `<system>` in there instead), `threads` ("0": the cores
    shared among `instances`), `cache_bytes` of class states, `max_picture_bytes` and `max_pixels` of one picture,
    `max_mask_bytes` of one answer, `engine` ("session": ONNX Runtime in this process; "models": the stage models of
    this server, of at most `max_batch` rows).
    """

    suffix: str  # of the model's name, after the system's

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the artifact, run everything once, declare the metrics. An error here fails the load of the model."""
        settings = Settings.read(args)
        settings.parameters.update({key: settings.parameters.get(key) or text for key, text in DEFAULTS.items()})
        system_name = settings.name.removesuffix(self.suffix)
        system = _open_system(settings, system_name)
        self._engine = CountingEngine(system.engine)
        system.engine = self._engine
        self.max_picture_bytes = settings.number("max_picture_bytes")
        self.deployment = Deployment(
            system,
            _bank_folder(settings, system_name),
            cache_bytes=settings.number("cache_bytes"),
            max_pixels=settings.number("max_pixels"),
            max_mask_bytes=settings.number("max_mask_bytes"),
        )
        if settings.parameters["engine"] == "session":  # the server takes no calls of other models while it loads one
            for _ in range(2):
                self.deployment.rehearse(_noise())
            self._engine.forget()
        self._metrics = Metrics(system_name, args["model_instance_name"])
        self._timer: threading.Timer | None = None
        self.publish()

    def finalize(self) -> None:
        """Take the metrics back; the server would show them for ever."""
        if (timer := self._timer) is not None:
            timer.cancel()
            timer.join()
        self._metrics.close()

    answers: Callable[[list[Any]], list[Any]]  # one for each request

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer for each request."""
        answers = self.answers(requests)
        if self._timer is None:
            self._timer = threading.Timer(PUBLISH_SECONDS, self._publish_all)
            self._timer.daemon = True
            self._timer.start()
        return answers

    def publish(self) -> None:
        """Bring the metrics up to date."""
        self._metrics.publish(dict(self._engine.seconds), dict(self._engine.counts), self.deployment.counters)

    def _publish_all(self) -> None:
        self._timer = None  # what comes from now on needs another one
        self.publish()


def one_of(request: Any, first: str, second: str) -> str:
    """Which of two inputs was sent. Raises InputError ``input_choice`` unless it is exactly one."""
    sent = [name for name in (first, second) if input_array(request, name) is not None]
    if len(sent) != 1:
        raise InputError(
            "input_choice",
            f"{'both' if sent else 'neither'} of the inputs '{first}' and '{second}' {'were' if sent else 'was'} sent",
            "",
            f"Send '{first}' (encoded files) or '{second}' (arrays).",
        )
    return sent[0]


def texts_of(request: Any, name: str) -> list[str]:
    """The elements of a text input. Raises InputError ``class_name`` for one that is not UTF-8."""
    try:
        return [bytes(element).decode() for element in required(request, name).reshape(-1)]
    except UnicodeDecodeError as error:
        raise InputError("class_name", f"'{name}' holds a text that is not UTF-8", str(error), "Encode it.") from error


def _open_system(settings: Settings, name: str) -> StagedSystem:
    folder = settings.version_folder / settings.parameters["artifact"]
    if settings.parameters["engine"] == "models":
        artifact = Artifact.open(folder)
        engine = TritonEngine(name, artifact.specs, settings.number("max_batch"))
        return system_class(artifact.manifest["system"])(
            artifact.name, artifact.specs, engine, artifact.manifest["preprocessing"], artifact.fingerprint
        )
    threads = settings.number("threads") or max(1, available_cores() // settings.number("instances"))
    return load(folder, threads=threads)


def _bank_folder(settings: Settings, system: str) -> Path:
    root = os.environ.get("FSSDEPLOY_BANK")
    if root:
        return Path(root).absolute() / system
    return (settings.folder / settings.parameters.get("bank", f"../../bank/{system}")).resolve()


def _noise() -> bytes:
    """A picture file of 128 x 128 pixels."""
    levels = np.arange(128 * 128 * 3, dtype=np.uint32).reshape(128, 128, 3)
    stream = io.BytesIO()
    Image.fromarray((levels * 2654435761 >> 24).astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()
