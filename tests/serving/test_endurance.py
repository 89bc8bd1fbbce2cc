"""The real server and the world around it: a disk that is full, clients that dawdle, ten thousand requests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="repositories and clients need the extra 'serve'")

from fssdeploy.bank.bank import Bank
from fssdeploy.errors import MachineError
from fssdeploy.serving.client import Client
from fssdeploy.serving.configs import Options
from fssdeploy.serving.environment import Environment
from fssdeploy.serving.repository import write_repository
from fssdeploy.serving.server import Server
from tests.serving.grey import write_artifact

SIDE = 64
ALL = np.ones((SIDE, SIDE), bool)


def flat(level: int) -> np.ndarray:
    """A picture of one grey; the system finds what is less than 30 levels away."""
    return np.full((SIDE, SIDE, 3), level, np.uint8)


@pytest.fixture(scope="module")
def served(server_environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the two models of one enrolled path."""
    folder = tmp_path_factory.mktemp("endurance")
    write_repository([f"grey={write_artifact(folder / 'grey')}"], folder / "models", Options())
    for model in (folder / "models").iterdir():
        if model.is_dir() and not model.name.endswith(("_enroll", "_segment")):
            shutil.rmtree(model)
    with Server(folder / "models", server_environment, log=folder / "log", exit_timeout=2) as server:
        yield server


def members(server: Server) -> list[int]:
    """The processes of the server: itself and one for each instance of a model."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == server.pid:
            found.append(int(status.parent.name))
    return found


@pytest.fixture
def small_disk(served: Server) -> Iterator[Path]:
    """A disk of one megabyte in place of the folder of the banks. Only an administrator may do that."""
    folder = served.repository.parent / "bank"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"A FULL DISK WAS NOT TESTED: {done.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_loses_nothing_and_says_so(served: Server, small_disk: Path) -> None:
    filler = small_disk / "filler"
    with Client(served.http_url, "grey", timeout=60) as client:
        before = client.enroll("kept", [flat(10)], [ALL]).version
        with filler.open("wb", buffering=0) as stream, pytest.raises(OSError, match="space"):
            while True:
                stream.write(bytes(4096))
        with pytest.raises(MachineError) as caught:
            client.enroll("kept", [flat(200)], [ALL])
        assert caught.value.code == "no_space"
        assert "\n" not in caught.value.line() and "Traceback" not in caught.value.line()
        assert client.segment(flat(10), ["kept"])["kept"].mask.all()  # what is there is still found
        filler.unlink()
        with Bank.open(small_disk / "grey") as bank:
            assert bank.verify() == []
            assert [info.version for info in bank.versions("kept")] == [before]
        assert client.enroll("kept", [flat(200)], [ALL]).version == before + 1
        assert client.segment(flat(200), ["kept"])["kept"].mask.all()


def test_clients_that_dawdle_hold_up_nobody(served: Server) -> None:
    """Forty connections that send half a request, or never read what they asked for, beside one that works."""
    host, port = served.http_url.split(":")
    half = b"POST /v2/models/grey_segment/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"{" * 1000
    whole = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50
    dawdlers = [socket.create_connection((host, int(port)), timeout=5) for _ in range(40)]
    try:
        with Client(served.http_url, "grey", timeout=30, retries=0) as client:
            client.enroll("prompt", [flat(90)], [ALL])
            for number, dawdler in enumerate(dawdlers):
                dawdler.sendall(half if number % 2 else whole)
            for turn in range(20):
                dawdlers[2 * turn + 1].sendall(b"{")  # still sending
                start = time.monotonic()
                assert client.segment(flat(90), ["prompt"])["prompt"].mask.all()
                assert time.monotonic() - start < 5
    finally:
        for dawdler in dawdlers:
            dawdler.close()
    with Client(served.http_url, "grey", timeout=30) as client:
        assert client.segment(flat(90), ["prompt"])["prompt"].mask.all()


def own_bytes(server: Server) -> int:
    """Memory that the server's processes hold for themselves, shared pages divided among those who share them."""
    total = 0
    for process in members(server):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_as_it_was(served: Server) -> None:
    """Pictures of varying sizes through both protocols, now and then an enrolment or a mistake."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 320, (50, 2))
    pictures = [np.full((*size, 3), 120, np.uint8) for size in sizes.tolist()]
    held: dict[int, int] = {}
    clients = [Client(served.http_url, "grey", timeout=60), Client(served.grpc_url, "grey", "grpc", timeout=60)]
    clients[0].enroll("many", [flat(120)], [ALL])
    for number in range(10_001):
        client = clients[number % 2]
        assert client.segment(pictures[number % 50], ["many"])["many"].mask.all()
        if number % 100 == 0:
            client.enroll("many", [flat(118 + number % 4)], [ALL])
        if number % 10 == 0:
            with pytest.raises(Exception, match="class"):
                client.segment(pictures[0], ["nobody"])
        if number in (1000, 10_000):
            held[number] = own_bytes(served)
    for client in clients:
        client.close()
    print(
        f"server's memory after 1,000 requests: {held[1000] / 2**20:.1f} MiB, after 10,000: {held[10_000] / 2**20:.1f}"
    )
    assert held[10_000] - held[1000] < 8 * 2**20, {number: size // 2**20 for number, size in held.items()}
