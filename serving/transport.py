"""How a client reaches the server: HTTP or gRPC, waiting or asynchronous, behind one set of operations.

Every transport has `infer`, `index`, `status`, `register`, `unregister` and `close`, each with the seconds it may take;
those of the asynchronous ones are coroutines. They raise what their libraries raise; `failures.explain` knows it.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any
from urllib.parse import quote

from fssdeploy.errors import InputError, MachineError
from fssdeploy.serving.failures import NotSentError

PROTOCOLS = ("http", "grpc")
_BLOCK = 2**20


def library(protocol: str, asynchronous: bool = False) -> ModuleType:
    """tritonclient's module for a protocol. Raises InputError ``protocol``, MachineError ``package_missing``."""
    if protocol not in PROTOCOLS:
        raise InputError("protocol", f"there is no protocol '{protocol}'", "", f"Choose from: {', '.join(PROTOCOLS)}.")
    try:
        if protocol == "grpc":
            import tritonclient.grpc as waiting_grpc

            if not asynchronous:
                return waiting_grpc
            import tritonclient.grpc.aio as asynchronous_grpc

            return asynchronous_grpc
        import tritonclient.http as waiting_http

        if not asynchronous:
            return waiting_http
        import tritonclient.http.aio as asynchronous_http
    except ImportError as error:
        raise MachineError(
            "package_missing",
            "a client of the server needs the package tritonclient",
            str(error),
            "Run: pip install 'fssdeploy[serve]'",
        ) from error
    return asynchronous_http


class HttpTransport:
    """HTTP through the standard library, which sends a request once: tritonclient's sends it again, unasked, when the
    connection breaks, and that may enrol twice. Safe among threads; connections are kept and used again.
    """

    def __init__(self, address: str) -> None:
        self.library = library("http")
        self._address = address
        self._idle: list[http.client.HTTPConnection] = []

    def infer(self, model: str, inputs: Sequence[Any], outputs: Sequence[Any], seconds: float) -> Any:
        client = self.library.InferenceServerClient
        body, header = client.generate_request_body(inputs, outputs)
        headers = {"Content-Type": "application/octet-stream"}
        if header is not None:
            headers["Inference-Header-Content-Length"] = str(header)
        data, answered = self._ask("POST", f"/v2/models/{quote(model)}/infer", seconds, body, headers)
        length = answered.get("Inference-Header-Content-Length")
        return client.parse_response_body(data, header_length=int(length) if length else None)

    def index(self, seconds: float) -> list[dict[str, Any]]:
        return json.loads(self._ask("POST", "/v2/repository/index", seconds)[0])

    def status(self, seconds: float) -> dict[str, Any]:
        found = json.loads(self._ask("GET", "/v2", seconds)[0])
        try:
            self._ask("GET", "/v2/health/ready", seconds)
        except self.library.InferenceServerException:
            return {**found, "ready": False}
        return {**found, "ready": True}

    def register(self, name: str, key: str, size: int, seconds: float) -> None:
        body = json.dumps({"key": key, "offset": 0, "byte_size": size}).encode()
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(name)}/register", seconds, body)

    def unregister(self, name: str, seconds: float) -> None:
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(name)}/unregister", seconds)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _ask(
        self, method: str, path: str, seconds: float, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, http.client.HTTPMessage]:
        until = time.monotonic() + seconds
        connection = self._connection(seconds)
        wire = connection.sock  # the connection forgets it when the server says that it will close
        try:
            _limit(wire, until)
            connection.request(method, path, body, dict(headers or {}))
            _limit(wire, until)
            response = connection.getresponse()
            expected = response.length
            blocks = []
            _limit(wire, until)
            while block := response.read1(_BLOCK):  # what is there: `read` would wait for all of it
                blocks.append(block)
                _limit(wire, until)
            response.close()  # `read1` does not notice the end, and the connection would wait for it
            data = b"".join(blocks)
            if expected is not None and len(data) < expected:
                raise ConnectionError(f"{len(data)} of {expected} bytes of the answer came")
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        if response.status != http.client.OK:
            raise self.library.InferenceServerException(_message(data), str(response.status))
        return data, response.headers

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        while self._idle:
            connection = self._idle.pop()
            if _open(connection):
                return connection
            connection.close()
        connection = http.client.HTTPConnection(self._address, timeout=seconds)
        try:
            connection.connect()
        except TimeoutError:
            raise
        except OSError as error:
            raise NotSentError(str(error)) from error
        return connection


class GrpcTransport:
    """gRPC through tritonclient. Safe among threads."""

    def __init__(self, address: str) -> None:
        self.library = library("grpc")
        self._client = self.library.InferenceServerClient(address)

    def infer(self, model: str, inputs: Sequence[Any], outputs: Sequence[Any], seconds: float) -> Any:
        return self._client.infer(model, inputs, outputs=outputs, client_timeout=seconds)

    def index(self, seconds: float) -> list[dict[str, Any]]:
        return _index(self._client.get_model_repository_index(client_timeout=seconds))

    def status(self, seconds: float) -> dict[str, Any]:
        found = self._client.get_server_metadata(client_timeout=seconds)
        return _server(found, self._client.is_server_ready(client_timeout=seconds))

    def register(self, name: str, key: str, size: int, seconds: float) -> None:
        self._client.register_system_shared_memory(name, key, size, client_timeout=seconds)

    def unregister(self, name: str, seconds: float) -> None:
        self._client.unregister_system_shared_memory(name, client_timeout=seconds)

    def close(self) -> None:
        self._client.close()


class AsyncHttpTransport:
    """HTTP through tritonclient and aiohttp, which does not repeat requests either."""

    def __init__(self, address: str) -> None:
        self.library = library("http", asynchronous=True)
        self._address = address
        self._made: Any = None

    async def infer(self, model: str, inputs: Sequence[Any], outputs: Sequence[Any], seconds: float) -> Any:
        return await self._in_time(self._client().infer(model, inputs, outputs=outputs), seconds)

    async def index(self, seconds: float) -> list[dict[str, Any]]:
        return await self._in_time(self._client().get_model_repository_index(), seconds)

    async def status(self, seconds: float) -> dict[str, Any]:
        found = await self._in_time(self._client().get_server_metadata(), seconds)
        return {**found, "ready": await self._in_time(self._client().is_server_ready(), seconds)}

    async def register(self, name: str, key: str, size: int, seconds: float) -> None:
        await self._in_time(self._client().register_system_shared_memory(name, key, size), seconds)

    async def unregister(self, name: str, seconds: float) -> None:
        await self._in_time(self._client().unregister_system_shared_memory(name), seconds)

    async def close(self) -> None:
        if self._made:
            await self._made.close()
            self._made = None

    def _client(self) -> Any:
        if self._made is None:  # it needs the running event loop; a timeout of its own would shorten longer ones
            self._made = self.library.InferenceServerClient(self._address, conn_timeout=None)
        return self._made

    async def _in_time(self, work: Any, seconds: float) -> Any:
        import asyncio

        import aiohttp

        try:
            return await asyncio.wait_for(work, seconds)
        except aiohttp.ClientConnectorError as error:
            raise NotSentError(str(error)) from error


class AsyncGrpcTransport:
    """gRPC through tritonclient and grpc.aio."""

    def __init__(self, address: str) -> None:
        self.library = library("grpc", asynchronous=True)
        self._address = address
        self._made: Any = None

    async def infer(self, model: str, inputs: Sequence[Any], outputs: Sequence[Any], seconds: float) -> Any:
        return await self._client().infer(model, inputs, outputs=outputs, client_timeout=seconds)

    async def index(self, seconds: float) -> list[dict[str, Any]]:
        return _index(await self._client().get_model_repository_index(client_timeout=seconds))

    async def status(self, seconds: float) -> dict[str, Any]:
        found = await self._client().get_server_metadata(client_timeout=seconds)
        return _server(found, await self._client().is_server_ready(client_timeout=seconds))

    async def register(self, name: str, key: str, size: int, seconds: float) -> None:
        await self._client().register_system_shared_memory(name, key, size, client_timeout=seconds)

    async def unregister(self, name: str, seconds: float) -> None:
        await self._client().unregister_system_shared_memory(name, client_timeout=seconds)

    async def close(self) -> None:
        if self._made:
            await self._made.close()
            self._made = None

    def _client(self) -> Any:
        if self._made is None:  # it needs the running event loop
            self._made = self.library.InferenceServerClient(self._address)
        return self._made


def _limit(wire: socket.socket, until: float) -> None:
    """Let the next step on this connection take until then, at most. Raises TimeoutError when that is past."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    wire.settimeout(left)


def _open(connection: http.client.HTTPConnection) -> bool:
    """Whether a connection that was idle is still there: of one that the server closed, the end can be read."""
    if connection.sock is None:
        return False
    connection.sock.setblocking(False)
    try:
        connection.sock.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _message(data: bytes) -> str:
    try:
        return json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return data[:200].decode("utf-8", "replace")


def _index(response: Any) -> list[dict[str, Any]]:
    fields = ("name", "version", "state", "reason")
    return [{field: getattr(model, field) for field in fields} for model in response.models]


def _server(found: Any, ready: bool) -> dict[str, Any]:
    return {"name": found.name, "version": found.version, "extensions": list(found.extensions), "ready": ready}
