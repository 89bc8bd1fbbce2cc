"""Clients of `fssdeploy serve` with the calls of the local API, `fssdeploy.deployment.Deployment`.

with Client("127.0.0.1:8000") as client:
    client.enroll("cup", ["cup.jpg"], ["cup-mask.png"])
    found = client.segment("table.jpg", ["cup"])["cup"].mask
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from fssdeploy.deployment import Enrolled, Found, MaskSource, PictureSource
from fssdeploy.errors import FssError, InputError, MachineError
from fssdeploy.files import storage_error
from fssdeploy.serving.calls import (
    Call,
    Outputs,
    enroll_call,
    enrolled_of,
    found_of,
    masks_of,
    once_call,
    segment_call,
    systems_of,
)
from fssdeploy.serving.failures import Repeat, explain
from fssdeploy.serving.names import Names
from fssdeploy.serving.transport import AsyncGrpcTransport, AsyncHttpTransport, GrpcTransport, HttpTransport, library

TIMEOUT = 30.0
RETRIES = 2
_FIRST_PAUSE = 0.1  # seconds; doubled for every further one, and varied so that many clients do not return together
_LINE = 64  # bytes: tensors in shared memory begin at multiples of this
_SMALLEST = 2**16  # bytes of a region, so that it fits the next request too
# After these the server may still be at work on a request, and on its memory.
_UNFINISHED = ("timeout", "connection_lost", "server_unavailable", "shared_memory")
_TYPES = {"u": "UINT8", "b": "BOOL", "O": "BYTES"}

T = TypeVar("T")
# A client's work as a generator: it yields (operation of the transport, arguments) and is sent what that returned, so
# that waiting and asynchronous clients share it. The operation "sleep" takes seconds.
Steps = Generator[tuple[str, tuple[Any, ...]], Any, T]


class _Region:
    """Shared memory that the server knows by `name`."""

    def __init__(self, size: int) -> None:
        self.name = f"fssdeploy_{secrets.token_hex(8)}"
        try:
            self.memory = SharedMemory(self.name, create=True, size=size)
        except OSError as error:
            raise storage_error(error, "shared memory") from error

    @property
    def size(self) -> int:
        return self.memory.size

    def bytes_at(self, start: int, count: int) -> np.ndarray:
        """uint8 (count,): that part of the memory itself."""
        assert self.memory.buf is not None
        return np.frombuffer(self.memory.buf, np.uint8, count, start)

    def drop(self) -> None:
        """Give the memory back; the server may still hold it."""
        with suppress(BufferError):  # an array on it is still in use; the name goes in any case
            self.memory.close()
        with suppress(FileNotFoundError):
            self.memory.unlink()


class _Core:
    """What both clients do: build requests, repeat them where that is safe, keep shared memory."""

    def __init__(
        self, url: str, system: str | None, protocol: str | None, shared_memory: bool, timeout: float, retries: int
    ) -> None:
        if not 0 < timeout < float("inf") or retries < 0:
            raise InputError("usage", f"timeout {timeout} and retries {retries} cannot be used", "", "")
        scheme, separator, address = url.rpartition("://")
        protocol = protocol or scheme or "http"
        if separator and scheme != protocol:
            raise InputError(
                "protocol", f"'{url}' is no address for {protocol}", "", f"Give {protocol}://{address}, or host:port."
            )
        self.url, self.protocol = url, protocol
        self.timeout, self.retries = timeout, retries
        self.address = address.rstrip("/")
        self._names = Names(system) if system else None
        self._library = library(protocol)
        self._shared_memory = shared_memory
        self._idle: list[_Region] = []
        self._lost: list[str] = []  # regions that the server would not let go

    def run(self, build: Callable[[Names], Call], read: Callable[[Outputs], T]) -> Steps[T]:
        """One request to its end. `build` makes it for a system, `read` takes the answer apart."""
        until = time.monotonic() + self.timeout
        if self._names is None:
            index = yield from self._repeated("index", (), until, Repeat.IF_HARMLESS)
            self._names = Names(_only(systems_of(index), self.url))
        call = build(self._names)
        allowed = Repeat.IF_HARMLESS if call.repeatable else Repeat.ALWAYS
        if self._shared_memory:
            return (yield from self._in_shared_memory(call, read, until, allowed))
        inputs = [self._input(name, array).set_data_from_numpy(array) for name, array in call.inputs.items()]
        outputs = [self._library.InferRequestedOutput(name) for name in call.outputs]
        result = yield from self._repeated("infer", (call.model, inputs, outputs), until, allowed)
        return read(lambda name: _output(result, name))

    def status(self) -> Steps[dict[str, Any]]:
        until = time.monotonic() + self.timeout
        found = yield from self._repeated("status", (), until, Repeat.IF_HARMLESS)
        index = yield from self._repeated("index", (), until, Repeat.IF_HARMLESS)
        return {
            "server": found["name"],
            "version": found["version"],
            "ready": found["ready"],
            "systems": systems_of(index),
            "models": [{"name": entry["name"], "state": entry.get("state", "UNAVAILABLE")} for entry in index],
        }

    def close(self) -> Steps[None]:
        """Take the shared memory back."""
        names = self._lost + [region.name for region in self._idle]
        for region in self._idle:
            region.drop()
        self._idle, self._lost = [], []
        for name in names:
            with suppress(Exception):  # the server is gone, or still works on an answer that nobody waits for
                yield "unregister", (name, 1.0)

    def _repeated(self, operation: str, arguments: tuple[Any, ...], until: float, allowed: Repeat) -> Steps[Any]:
        """Do an operation, again where it failed and is known not to have been done (or `allowed` says any failure)."""
        pause = _FIRST_PAUSE
        for attempt in range(self.retries + 1):
            left = until - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                return (yield operation, (*arguments, left))
            except FssError:
                raise
            except Exception as error:
                failure = explain(error, self.url, self.timeout)
                again = failure.repeat is Repeat.ALWAYS or failure.repeat is allowed is Repeat.IF_HARMLESS
                rest = pause * random.uniform(0.5, 1.5)
                last = attempt == self.retries or time.monotonic() + rest >= until
                if failure.region_lost or last or not again:
                    raise failure.error from error
            yield "sleep", (rest,)
            pause *= 2
        raise AssertionError("unreachable")

    def _in_shared_memory(self, call: Call, read: Callable[[Outputs], T], until: float, allowed: Repeat) -> Steps[T]:
        from tritonclient.utils import serialize_byte_tensor

        raw = {
            name: np.frombuffer(serialize_byte_tensor(array).item(), np.uint8)
            if array.dtype.kind == "O"
            else np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for name, array in call.inputs.items()
        }
        starts, size = {}, 0
        for name, count in [(name, data.size) for name, data in raw.items()] + list(call.large.items()):
            starts[name] = size
            size += -(-count // _LINE) * _LINE
        while True:
            region = self._take(size)
            known = region is not None
            try:
                return (
                    yield from self._in_region(
                        region or _Region(max(size, _SMALLEST)), known, call, raw, starts, read, until, allowed
                    )
                )
            except FssError as error:
                if not (known and error.code == "shared_memory"):
                    raise
                # The server was started anew and knows the region no more; with the next one, or a new one, then.

    def _in_region(
        self,
        region: _Region,
        known: bool,
        call: Call,
        raw: Mapping[str, np.ndarray],
        starts: Mapping[str, int],
        read: Callable[[Outputs], T],
        until: float,
        allowed: Repeat,
    ) -> Steps[T]:
        """One request whose inputs, as bytes in `raw`, and large outputs begin in the region where `starts` says."""
        kept = False
        try:
            if not known:
                yield from self._register(region, until)
                known = True
            inputs, outputs = [], []
            for name, data in raw.items():
                region.bytes_at(starts[name], data.size)[:] = data
                tensor = self._input(name, call.inputs[name])
                tensor.set_shared_memory(region.name, data.size, starts[name])
                inputs.append(tensor)
            for name in call.outputs:
                wanted = self._library.InferRequestedOutput(name)
                if name in call.large:
                    wanted.set_shared_memory(region.name, call.large[name], starts[name])
                outputs.append(wanted)
            result = yield from self._repeated("infer", (call.model, inputs, outputs), until, allowed)
            found = read(
                lambda name: (
                    _shared_output(result, name, region, starts[name]) if name in call.large else _output(result, name)
                )
            )
            kept = True
            return found
        except FssError as error:
            # An answer, even of refusal, means that the server is done with the memory.
            kept = known and error.code not in _UNFINISHED
            raise
        finally:
            if kept:
                self._idle.append(region)
            else:
                region.drop()
                self._lost.append(region.name)

    def _register(self, region: _Region, until: float) -> Steps[None]:
        arguments = region.name, f"/{region.name}", region.size
        try:
            yield from self._repeated("register", arguments, until, Repeat.ALWAYS)
        except InputError as error:
            why, fix = error.line(), "Make a client without it: it is for servers on the same machine that allow it."
            raise MachineError("shared_memory", "the server cannot use the shared memory", why, fix) from error

    def _take(self, size: int) -> _Region | None:
        """A region that is not in use and large enough; smaller ones stay for smaller requests."""
        for region in sorted(self._idle, key=lambda region: region.size):
            if region.size >= size:
                with suppress(ValueError):  # another thread took it
                    self._idle.remove(region)
                    return region
        return None

    def _input(self, name: str, array: np.ndarray) -> Any:
        return self._library.InferInput(name, list(array.shape), _TYPES[array.dtype.kind])


class Client:
    """A client that waits for its answers. Safe among threads.

    `url` is host:port, for `protocol` "http" (the default) or "grpc"; it may begin with the protocol and ``://``.
    `system` may be left out where the server serves one. `timeout` is the time that a call may take in seconds,
    repetitions included. A call is repeated up to `retries` times where no connection could be made or the server
    refused it unseen, and a `segment` also where the connection broke. With `shared_memory`, which needs a server on
    the same machine, pictures and masks do not go through the connection.

    Errors are those of `Deployment`, and InputError ``model_missing``, ``request_refused``, MachineError
    ``server_unreachable``, ``server_busy``, ``server_unavailable``, ``server_failed``, ``connection_lost``, ``timeout``
    (the server may still finish: after an enrolment, look whether the class is there), ``shared_memory``,
    ``package_missing`` (the extra ``serve`` is not installed).
    """

    def __init__(
        self,
        url: str,
        system: str | None = None,
        protocol: str | None = None,
        shared_memory: bool = False,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        self._core = _Core(url, system, protocol, shared_memory, timeout, retries)
        transport = GrpcTransport if self._core.protocol == "grpc" else HttpTransport
        self._transport = transport(self._core.address)

    def enroll(
        self, name: str, pictures: Sequence[PictureSource], masks: Sequence[MaskSource], *, add: bool = False
    ) -> Enrolled:
        """As `Deployment.enroll`. Paths are read here."""
        return self._drive(
            self._core.run(
                lambda names: enroll_call(names, name, pictures, masks, add), lambda output: enrolled_of(name, output)
            )
        )

    def segment(self, picture: PictureSource, names: Sequence[str] | None = None) -> dict[str, Found]:
        """As `Deployment.segment`. A path is read here."""
        return self._drive(self._core.run(lambda system: segment_call(system, picture, names), found_of))

    def segment_once(
        self,
        pictures: Sequence[PictureSource],
        support_pictures: Sequence[PictureSource],
        support_masks: Sequence[MaskSource],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find in pictures, all of one size, what is marked in the support pictures, without a bank.

        Returns masks bool (n, H, W) and scores float32 (n,).
        """
        return self._drive(
            self._core.run(lambda names: once_call(names, pictures, support_pictures, support_masks), masks_of)
        )

    def status(self) -> dict[str, Any]:
        """The server's name and version, whether it is ready, its systems, its models with their states."""
        return self._drive(self._core.status())

    def close(self) -> None:
        """Close the connections (an open one delays the server's end) and give shared memory back."""
        self._drive(self._core.close())
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drive(self, steps: Steps[T]) -> T:
        answer: Any = None
        failed: Exception | None = None
        try:
            while True:
                operation, arguments = steps.throw(failed) if failed else steps.send(answer)
                answer = failed = None
                try:
                    perform = time.sleep if operation == "sleep" else getattr(self._transport, operation)
                    answer = perform(*arguments)
                except Exception as error:
                    failed = error
        except StopIteration as end:
            return end.value
        finally:
            steps.close()


class AsyncClient:
    """As `Client`, for asyncio: every call is awaited, and any number may be under way at once."""

    def __init__(
        self,
        url: str,
        system: str | None = None,
        protocol: str | None = None,
        shared_memory: bool = False,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        self._core = _Core(url, system, protocol, shared_memory, timeout, retries)
        self._transport = (AsyncGrpcTransport if self._core.protocol == "grpc" else AsyncHttpTransport)(
            self._core.address
        )

    async def enroll(
        self, name: str, pictures: Sequence[PictureSource], masks: Sequence[MaskSource], *, add: bool = False
    ) -> Enrolled:
        """As `Client.enroll`."""
        return await self._drive(
            self._core.run(
                lambda names: enroll_call(names, name, pictures, masks, add), lambda output: enrolled_of(name, output)
            )
        )

    async def segment(self, picture: PictureSource, names: Sequence[str] | None = None) -> dict[str, Found]:
        """As `Client.segment`."""
        return await self._drive(self._core.run(lambda system: segment_call(system, picture, names), found_of))

    async def segment_once(
        self,
        pictures: Sequence[PictureSource],
        support_pictures: Sequence[PictureSource],
        support_masks: Sequence[MaskSource],
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Client.segment_once`."""
        return await self._drive(
            self._core.run(lambda names: once_call(names, pictures, support_pictures, support_masks), masks_of)
        )

    async def status(self) -> dict[str, Any]:
        """As `Client.status`."""
        return await self._drive(self._core.status())

    async def close(self) -> None:
        """As `Client.close`."""
        await self._drive(self._core.close())
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _drive(self, steps: Steps[T]) -> T:
        import asyncio

        answer: Any = None
        failed: Exception | None = None
        try:
            while True:
                operation, arguments = steps.throw(failed) if failed else steps.send(answer)
                answer = failed = None
                try:
                    perform = asyncio.sleep if operation == "sleep" else getattr(self._transport, operation)
                    answer = await perform(*arguments)
                except Exception as error:
                    failed = error
        except StopIteration as end:
            return end.value
        finally:
            steps.close()


def _only(systems: Sequence[str], url: str) -> str:
    if len(systems) == 1:
        return systems[0]
    what = f"the server at {url} serves {len(systems)} systems"
    if not systems:
        raise MachineError("server_empty", what, "none with an enrolled path", "Serve what fssdeploy repo wrote.")
    raise InputError("system_needed", what, ", ".join(systems), "Name one of them.")


def _shared_output(result: Any, name: str, region: _Region, start: int) -> np.ndarray:
    described = result.get_output(name)
    sides = described["shape"] if isinstance(described, dict) else described.shape
    shape = tuple(int(side) for side in sides)
    array = region.bytes_at(start, math.prod(shape))
    return array.reshape(shape).copy()  # the region is used again


def _output(result: Any, name: str) -> np.ndarray:
    array = result.as_numpy(name)
    if array is None:
        raise MachineError("server_failed", "the server failed", f"its answer lacks '{name}'", "Look into its log.")
    return array
