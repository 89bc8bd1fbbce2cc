"""The client without a server: what is sent again and what is not, what errors become, what requests are made of."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tritonclient", reason="the client needs the extra 'serve'")

from tritonclient.utils import InferenceServerException  # noqa: E402

from fssdeploy.deployment import Enrolled
from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError
from fssdeploy.images.pictures import load_picture, picture_size
from fssdeploy.serving import client as module
from fssdeploy.serving.calls import enroll_call, once_call, segment_call, systems_of
from fssdeploy.serving.client import AsyncClient, Client
from fssdeploy.serving.failures import Repeat, explain
from fssdeploy.serving.names import Names
from fssdeploy.serving.transport import HttpTransport
from tests.cli.command import fssdeploy

PICTURE = np.full((6, 8, 3), 90, np.uint8)
MASK = np.eye(6, 8, dtype=bool)
ENROLLED = {"version": np.array([3]), "shots": np.array([2])}
FOUND = {
    "names_found": np.array([b"cup"], object),
    "masks": MASK[None].astype(np.uint8),
    "scores": np.array([0.75], np.float32),
    "versions": np.array([3]),
}
NO_CONNECTION = InferenceServerException("failed to connect to all addresses", "StatusCode.UNAVAILABLE")
QUEUE_FULL = InferenceServerException("Exceeds maximum queue size", "503")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 1e-4)


class Scripted:
    """A transport whose requests end as told, one after the other; it keeps what was asked."""

    def __init__(self, *endings: Any) -> None:
        self.endings = list(endings)
        self.asked: list[tuple[str, ...]] = []

    def infer(self, model: str, inputs: Any, outputs: Any, seconds: float) -> Any:
        return self._end("infer", model)

    def index(self, seconds: float) -> Any:
        return self._end("index")

    def register(self, name: str, key: str, size: int, seconds: float) -> None:
        self._end("register", name)

    def unregister(self, name: str, seconds: float) -> None:
        self.asked.append(("unregister", name))

    def close(self) -> None:
        self.asked.append(("close",))

    def _end(self, *what: str) -> Any:
        self.asked.append(what)
        ending = self.endings.pop(0)
        if isinstance(ending, Exception):
            raise ending
        if isinstance(ending, dict):
            return SimpleNamespace(as_numpy=ending.get)
        return ending


def scripted(*endings: Any, **options: Any) -> tuple[Client, Scripted]:
    client = Client("127.0.0.1:1", "fsdino", **options)
    client._transport = Scripted(*endings)  # type: ignore[assignment]
    return client, client._transport  # type: ignore[return-value]


def refused(code: str, kind: type[FssError], call: Callable[[], Any]) -> FssError:
    with pytest.raises(FssError) as caught:
        call()
    assert (caught.value.code, type(caught.value)) == (code, kind)
    assert "\n" not in caught.value.line()
    return caught.value


def test_answers_are_those_of_the_local_api() -> None:
    client, asked = scripted(ENROLLED, FOUND)
    assert client.enroll("e\u0301", [PICTURE], [MASK]) == Enrolled("\u00e9", 3, 2)
    found = client.segment(PICTURE)
    assert list(found) == ["cup"]
    assert found["cup"].mask.dtype == bool and (found["cup"].mask == MASK).all()
    assert (found["cup"].score, found["cup"].version) == (0.75, 3)
    assert asked.asked == [("infer", "fsdino_enroll"), ("infer", "fsdino_segment")]


@pytest.mark.parametrize("failure", [NO_CONNECTION, QUEUE_FULL], ids=["no connection", "queue full"])
def test_what_the_server_has_not_seen_is_sent_again(failure: Exception) -> None:
    client, asked = scripted(failure, failure, ENROLLED)
    assert client.enroll("cup", [PICTURE], [MASK]).version == 3
    assert len(asked.asked) == 3
    client, asked = scripted(failure, failure, failure, ENROLLED)
    with pytest.raises(MachineError):
        client.enroll("cup", [PICTURE], [MASK])
    assert len(asked.asked) == 3


@pytest.mark.parametrize("failure", [ConnectionResetError(104, "reset"), OSError("broken"), EOFError()])
def test_an_enrolment_that_may_have_happened_is_never_sent_again(failure: Exception) -> None:
    client, asked = scripted(failure, ENROLLED)
    refused("connection_lost", MachineError, lambda: client.enroll("cup", [PICTURE], [MASK]))
    assert len(asked.asked) == 1
    client, asked = scripted(failure, failure, FOUND)
    assert "cup" in client.segment(PICTURE)
    assert len(asked.asked) == 3


def test_an_answer_is_never_asked_for_again() -> None:
    text = "error[no_space]: the bank cannot be written: there is no space left on the disk. Free some space."
    for status in ("503", "StatusCode.UNAVAILABLE"):
        client, asked = scripted(InferenceServerException(text, status), FOUND)
        error = refused("no_space", MachineError, lambda client=client: client.segment(PICTURE))
        assert error.line() == text.partition(": ")[2]
        assert len(asked.asked) == 1


def test_retries_end_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.05)
    client, asked = scripted(*[QUEUE_FULL] * 100, timeout=0.3, retries=99)
    start = time.monotonic()
    refused("server_busy", MachineError, lambda: client.segment(PICTURE))
    assert time.monotonic() - start < 0.6
    assert 2 <= len(asked.asked) < 10


@pytest.mark.parametrize(
    ("text", "status", "code", "kind", "repeat"),
    [
        ("error[class_unknown]: there is no class 'x'", "404", "class_unknown", InputError, Repeat.NEVER),
        (
            "in ensemble 's', error[mask_size]: a. b",
            "StatusCode.INVALID_ARGUMENT",
            "mask_size",
            InputError,
            Repeat.NEVER,
        ),
        ("error[bank_damaged]: a: b. c", "500", "bank_damaged", IntegrityError, Repeat.NEVER),
        ("error[bank_damaged]: a", "StatusCode.INTERNAL", "bank_damaged", IntegrityError, Repeat.NEVER),
        ("Request for unknown model: 'm' is not found", "404", "model_missing", InputError, Repeat.NEVER),
        ("unexpected shape for input 'pixels'", "400", "request_refused", InputError, Repeat.NEVER),
        ("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED", "timeout", MachineError, Repeat.NEVER),
        ("Socket closed", "StatusCode.UNAVAILABLE", "server_unavailable", MachineError, Repeat.IF_HARMLESS),
        (
            "failed to connect to all addresses",
            "StatusCode.UNAVAILABLE",
            "server_unreachable",
            MachineError,
            Repeat.ALWAYS,
        ),
        ("Exceeds maximum queue size", "503", "server_busy", MachineError, Repeat.ALWAYS),
        ("Stub process 'm_0_0' is not healthy.", "500", "server_failed", MachineError, Repeat.NEVER),
        ("Unable to find shared memory region: 'r'", "400", "shared_memory", MachineError, Repeat.ALWAYS),
    ],
)
def test_errors_in_our_words(text: str, status: str, code: str, kind: type, repeat: Repeat) -> None:
    failure = explain(InferenceServerException(text, status), "host:1", 5)
    assert (failure.error.code, type(failure.error), failure.repeat) == (code, kind, repeat)


def test_the_system_is_found_where_there_is_one() -> None:
    names = ["fsdino_enroll", "fsdino_segment", "fsdino_stage_enroll", "fsdino_stage_segment", "x_segment", "fsdino"]
    index = [{"name": name} for name in names]
    assert systems_of(index) == ["fsdino"]
    client = Client("127.0.0.1:1")
    client._transport = Scripted(index, FOUND, FOUND)  # type: ignore[assignment]
    client.segment(PICTURE)
    client.segment(PICTURE)
    assert [step[0] for step in client._transport.asked] == ["index", "infer", "infer"]  # type: ignore[attr-defined]
    for models, code, kind in (
        ([], "server_empty", MachineError),
        (index + [{"name": "x_enroll"}], "system_needed", InputError),
    ):
        client = Client("127.0.0.1:1")
        client._transport = Scripted(models)  # type: ignore[assignment]
        refused(code, kind, lambda client=client: client.segment(PICTURE))


def png(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream.getvalue()


def test_what_requests_are_made_of(tmp_path: Path) -> None:
    names = Names("s")
    (tmp_path / "p.png").write_bytes(png(PICTURE))
    call = enroll_call(names, "n", [PICTURE, PICTURE], [MASK, MASK], True)
    assert call.model == "s_enroll" and not call.repeatable
    assert {key: array.shape for key, array in call.inputs.items()} == {
        "name": (1,),
        "add": (1,),
        "pixels": (2, 6, 8, 3),
        "mask_pixels": (2, 6, 8),
    }
    assert call.inputs["mask_pixels"].dtype == np.uint8
    mixed = enroll_call(names, "n", [PICTURE, tmp_path / "p.png"], [MASK, "box:0,0,3,3"], False)
    assert mixed.inputs["pictures"][1] == png(PICTURE) and mixed.inputs["masks"][1] == b"box:0,0,3,3"
    np.testing.assert_array_equal(load_picture(mixed.inputs["pictures"][0]), PICTURE)
    other_sizes = enroll_call(names, "n", [PICTURE, PICTURE[:5]], [MASK, MASK[:5]], False)
    assert [key for key in other_sizes.inputs if key not in ("name", "add")] == ["pictures", "masks"]
    labels = enroll_call(names, "n", [PICTURE], [MASK.astype(np.int64) * 255], False)
    assert "masks" in labels.inputs  # as it is: 255 of int64 must not become something else
    zeros = segment_call(names, b"\0\0", ["a", "b"])
    assert zeros.inputs["picture"][0] == b"\0\0" and zeros.large == {}
    assert segment_call(names, png(PICTURE), ["a", "b"]).large == {"masks": 96}
    assert segment_call(names, PICTURE, ["a"]).large == {"masks": 48}
    assert segment_call(names, PICTURE, None).large == {}
    assert once_call(names, [PICTURE], [b"x"], ["box:0,0,1,1"]).model == "s"
    refused("file_missing", InputError, lambda: segment_call(names, tmp_path / "none.png", None))
    refused("masks_count", InputError, lambda: enroll_call(names, "n", [PICTURE], [], False))
    refused("no_classes", InputError, lambda: segment_call(names, PICTURE, []))
    refused("class_name", InputError, lambda: segment_call(names, PICTURE, ["\ud800"]))
    refused("not_a_picture", InputError, lambda: segment_call(names, PICTURE[..., 0], None))
    refused("not_a_picture", InputError, lambda: enroll_call(names, "n", [PICTURE[..., 0]], [MASK], False))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_picture_without_decoding_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = png(PICTURE, exif=exif)
    assert picture_size(file) == load_picture(file).shape[:2]


@contextmanager
def listening(*answers: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads one request per connection and sends an answer, or hangs up on None; what it got."""
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def serve() -> None:
            for answer in answers:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += connection.recv(65536)
                    head, _, body = data.partition(b"\r\n\r\n")
                    length = next(
                        int(line.split(b":")[1])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length:")
                    )
                    while len(body) < length:
                        body += connection.recv(65536)
                    got.append(head + b"\r\n\r\n" + body)
                    if answer == b"wait":
                        connection.recv(1)  # until the client has enough
                    elif answer is not None:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", got
        server.close()
        thread.join()


def http_answer(body: dict[str, Any], status: str = "200 OK") -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


JSON_ENROLLED = http_answer(
    {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "version", "datatype": "INT64", "shape": [1], "data": [7]},
            {"name": "shots", "datatype": "INT64", "shape": [1], "data": [1]},
        ],
    }
)


def test_http_sends_an_enrolment_once_even_over_a_connection_that_breaks() -> None:
    with listening(None, JSON_ENROLLED) as (url, got), Client(url, "s") as client:
        refused("connection_lost", MachineError, lambda: client.enroll("a", [PICTURE], [MASK]))
        assert len(got) == 1
        assert client.enroll("a", [PICTURE], [MASK]) == Enrolled("a", 7, 1)
        assert len(got) == 2
        assert got[1].startswith(b"POST /v2/models/s_enroll/infer HTTP/1.1\r\n")
        assert b"inference-header-content-length" in got[1].lower()


def test_http_connects_anew_where_the_server_closed_an_idle_connection() -> None:
    with listening(JSON_ENROLLED, JSON_ENROLLED) as (url, got), Client(url, "s") as client:
        for _ in range(2):
            assert client.enroll("a", [PICTURE], [MASK]).version == 7
            time.sleep(0.05)  # the server closes after each answer
        assert len(got) == 2


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_server_at_all(kind: type, protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"127.0.0.1:{probe.getsockname()[1]}"
    client = kind(url, "s", protocol, retries=1, timeout=5)

    def ask() -> None:
        if kind is Client:
            client.enroll("a", [PICTURE], [MASK])
        else:
            asyncio.run(use(client))

    async def use(client: AsyncClient) -> None:
        async with client:
            await client.enroll("a", [PICTURE], [MASK])

    error = refused("server_unreachable", MachineError, ask)
    assert url in error.line()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_server_that_does_not_answer(kind: type) -> None:
    with listening(b"wait") as (url, got):
        client = kind(url, "s", timeout=0.4)

        async def use() -> None:
            async with client:
                await client.segment(PICTURE)

        start = time.monotonic()
        error = refused(
            "timeout", MachineError, (lambda: client.segment(PICTURE)) if kind is Client else lambda: asyncio.run(use())
        )
        assert 0.3 < time.monotonic() - start < 2
        assert "0.4 s" in error.line()
        assert len(got) == 1


def test_an_answer_that_comes_in_drops_does_not_outlive_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(40):
                    time.sleep(0.05)
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        client = Client(f"127.0.0.1:{server.getsockname()[1]}", "s", timeout=0.3)
        start = time.monotonic()
        refused("timeout", MachineError, lambda: client.segment(PICTURE))
        assert time.monotonic() - start < 1.5
        thread.join()


def test_an_answer_that_is_none_of_ours() -> None:
    # It says that it closes: a client that kept the connection could meet its end in the middle of the next request.
    gateway = b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nContent-Length: 5\r\n\r\n<hey>"
    with listening(gateway, http_answer({"outputs": []})) as (url, _):
        client = Client(url, "s", retries=0)
        assert "<hey>" in refused("server_failed", MachineError, lambda: client.segment(PICTURE)).line()
        refused("server_failed", MachineError, lambda: client.enroll("a", [PICTURE], [MASK]))


def test_shared_memory_is_used_again_and_given_back() -> None:
    client, asked = scripted(None, ENROLLED, ENROLLED, shared_memory=True)
    client.enroll("a", [PICTURE], [MASK])
    client.enroll("a", [PICTURE], [MASK])
    (region,) = client._core._idle
    assert Path("/dev/shm", region.name).exists()
    client.close()
    assert not Path("/dev/shm", region.name).exists()
    assert [step[0] for step in asked.asked] == ["register", "infer", "infer", "unregister", "close"]


def test_shared_memory_that_may_still_be_written_is_not_used_again() -> None:
    client, asked = scripted(None, TimeoutError(), None, ENROLLED, shared_memory=True)
    refused("timeout", MachineError, lambda: client.enroll("a", [PICTURE], [MASK]))
    assert client._core._idle == []
    client.enroll("a", [PICTURE], [MASK])
    first, second = (step[1] for step in asked.asked if step[0] == "register")
    assert first != second
    client.close()
    assert {step[1] for step in asked.asked if step[0] == "unregister"} == {first, second}
    assert not Path("/dev/shm", first).exists()


def test_shared_memory_after_a_restart_of_the_server() -> None:
    lost = InferenceServerException("Unable to find shared memory region: 'x'", "400")
    client, asked = scripted(None, ENROLLED, lost, None, ENROLLED, shared_memory=True)
    client.enroll("a", [PICTURE], [MASK])
    client.enroll("a", [PICTURE], [MASK])
    assert [step[0] for step in asked.asked] == ["register", "infer", "infer", "register", "infer"]
    client.close()


def test_shared_memory_of_another_machine() -> None:
    no_region = InferenceServerException("Unable to open shared memory region: '/x'", "400")
    client, _ = scripted(no_region, shared_memory=True)
    refused("shared_memory", MachineError, lambda: client.enroll("a", [PICTURE], [MASK]))
    assert client._core._idle == []
    client.close()


def test_the_two_clients_have_the_same_calls() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient) == {"enroll", "segment", "segment_once", "status", "close"}


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tritonclient")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    error = refused("package_missing", MachineError, lambda: Client("127.0.0.1:1"))
    assert "fssdeploy[serve]" in error.line()
    fssdeploy("client", "status", "127.0.0.1:1").check_refused("package_missing", 4)


def test_what_cannot_be_asked_for() -> None:
    refused("protocol", InputError, lambda: Client("127.0.0.1:1", protocol="smtp"))
    refused("system_name", InputError, lambda: Client("127.0.0.1:1", "../x"))
    for timeout in (0, -1, float("nan"), float("inf")):
        refused("usage", InputError, lambda timeout=timeout: Client("127.0.0.1:1", timeout=timeout))


def test_the_command_line_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(PICTURE))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"127.0.0.1:{probe.getsockname()[1]}"
    out = tmp_path / "out"
    for command in (
        ["status", url],
        ["enroll", url, "cup", "--image", tmp_path / "p.png", "--mask", "box:0,0,3,3", "--system", "s"],
        ["segment", url, tmp_path / "p.png", "--out", out, "--system", "s"],
    ):
        fssdeploy("client", *command).check_refused("server_unreachable", 4)
    assert not out.exists()
    fssdeploy("client", "segment", url, tmp_path / "no.png").check_refused("file_missing", 3)


def test_http_keeps_its_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        answered: list[bytes] = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for number in range(3):
                    answered.append(connection.recv(65536))
                    connection.sendall(http_answer({"number": number}, ["200 OK", "404 Not Found"][number == 1]))

        thread = threading.Thread(target=serve)
        thread.start()
        transport = HttpTransport(f"127.0.0.1:{server.getsockname()[1]}")
        assert transport.index(5.0) == {"number": 0}
        with pytest.raises(InferenceServerException):
            transport.index(5.0)
        assert transport.index(5.0) == {"number": 2}
        thread.join()
        transport.close()
    assert len(answered) == 3


def test_http_transport_is_shared_by_threads() -> None:
    with listening(*[http_answer({"models": number}) for number in range(8)]) as (url, got):
        transport = HttpTransport(url)
        threads = [threading.Thread(target=transport.index, args=(5.0,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 8
        transport.close()


@pytest.mark.parametrize("address", ["grpc://127.0.0.1:1", "http://127.0.0.1:1", "127.0.0.1:1"])
def test_the_address_may_name_the_protocol(address: str) -> None:
    with Client(address, "grey") as client:
        assert client._core.address == "127.0.0.1:1"
        assert client._core.protocol == (address.rpartition("://")[0] or "http")


def test_an_address_of_the_other_protocol_is_refused() -> None:
    with pytest.raises(InputError, match="no address for http") as caught:
        Client("grpc://127.0.0.1:1", "grey", "http")
    assert caught.value.code == "protocol"
