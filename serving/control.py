"""A running server's own HTTP interface, with the standard library alone: health, models, one inference.

What clients need is in `fssdeploy.serving.client`; this is what a supervisor needs, and it must not depend on extras.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class NoAnswerError(Exception):
    """The server did not answer: no connection, a connection that broke, or not in time."""


@dataclass(frozen=True)
class Answer:
    """Status and body of one reply."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def error(self) -> str:
        """The server's words for a failure, empty if there was none."""
        if self.ok:
            return ""
        try:
            return str(json.loads(self.body)["error"])
        except (ValueError, KeyError, TypeError):
            return f"HTTP status {self.status}"

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Counts:
    """Requests that a model has answered, well or with an error."""

    succeeded: int
    failed: int

    @property
    def all(self) -> int:
        return self.succeeded + self.failed


@dataclass(frozen=True)
class Tensor:
    """One input: name, Triton's data type (``BYTES``, ``FP32``), shape, and its elements as they travel."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes


@dataclass(frozen=True)
class Control:
    """The server at `host`:`port`. Every call opens a connection of its own and closes it.

    An idle one kept open would make the server's graceful stop wait for its whole time limit.
    """

    host: str
    port: int
    timeout: float = 5.0

    def name(self) -> str:
        """What the server was told to call itself; another one may have the port."""
        return str(self._call("GET", "/v2").json().get("name", ""))

    def ready(self) -> bool:
        """Whether the server and all its models say they are ready."""
        return self._call("GET", "/v2/health/ready").ok

    def states(self) -> list[dict[str, str]]:
        """`name`, and where known `version`, `state`, `reason` of every model in the repository."""
        return list(self._call("POST", "/v2/repository/index", b"{}").json())

    def config(self, model: str) -> dict[str, Any]:
        """The configuration of a loaded model, empty where the model is not there."""
        answer = self._call("GET", f"/v2/models/{model}/config")
        return dict(answer.json()) if answer.ok else {}

    def counts(self) -> dict[str, Counts]:
        """How many requests each model has answered so far."""
        found: dict[str, Counts] = {}
        for entry in self._call("GET", "/v2/models/stats").json()["model_stats"]:
            before, new = found.get(entry["name"], Counts(0, 0)), entry["inference_stats"]
            succeeded, failed = (new[kind]["count"] for kind in ("success", "fail"))
            found[entry["name"]] = Counts(before.succeeded + succeeded, before.failed + failed)
        return found

    def load(self, model: str, config: Mapping[str, Any] | None = None, timeout: float = 60.0) -> Answer:
        """Load or reload a model and wait for it; `config` takes the place of its file's configuration."""
        body = {"parameters": {"config": json.dumps(config)}} if config else {}
        return self._call("POST", f"/v2/repository/models/{model}/load", json.dumps(body).encode(), timeout=timeout)

    def unload(self, model: str) -> Answer:
        """Begin to unload a model."""
        return self._call("POST", f"/v2/repository/models/{model}/unload", b"{}")

    def infer(self, model: str, inputs: Sequence[Tensor], timeout: float) -> Answer:
        """One inference; the outputs stay as they travel."""
        header = {
            "inputs": [
                {
                    "name": tensor.name,
                    "datatype": tensor.datatype,
                    "shape": list(tensor.shape),
                    "parameters": {"binary_data_size": len(tensor.data)},
                }
                for tensor in inputs
            ],
            "parameters": {"binary_data_output": True},
        }
        head = json.dumps(header).encode()
        body = b"".join([head, *(tensor.data for tensor in inputs)])
        length = {"Inference-Header-Content-Length": str(len(head))}
        return self._call("POST", f"/v2/models/{model}/infer", body, length, timeout)

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout or self.timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            reply = connection.getresponse()
            return Answer(reply.status, reply.read())
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswerError(str(error) or type(error).__name__) from error
        finally:
            connection.close()
