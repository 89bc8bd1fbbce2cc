"""The server as a process, and the supervisor: the real server on a small repository of models made to misbehave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fssdeploy.errors import InputError, MachineError
from fssdeploy.serving import supervisor as supervising
from fssdeploy.serving.control import Answer, NoAnswerError, Tensor
from fssdeploy.serving.environment import SETTING, Environment
from fssdeploy.serving.server import SHARED_MEMORY, Server, choose_ports, sweep
from fssdeploy.serving.supervisor import Supervisor, instances, sample, stubs_of

CONFIG = """
backend: "python" max_batch_size: 0
input [ { name: "text" data_type: TYPE_STRING dims: [ -1 ] } ]
output [ { name: "same" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU count: COUNT } ]
"""
WARMUP = """
model_warmup [ { name: "sample" batch_size: 1 inputs { key: "text"
  value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "text" } } } ]
"""
# Answers with what it was sent; some texts make it die, hang, fail. An empty text is refused, unless it has a sample.
MODEL = """
import os, time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        INITIALIZE

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
        first = bytes(text[0])
        if first == b"die":
            os._exit(3)
        if first == b"hang":
            time.sleep(3600)
        if first == b"":
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("empty", pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor("same", text)])
"""


def write_model(repository: Path, name: str, *, count: int = 1, sample: bytes = b"", initialize: str = "pass") -> Path:
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(MODEL.replace("INITIALIZE", initialize))
    (folder / "config.pbtxt").write_text(CONFIG.replace("COUNT", str(count)) + (WARMUP if sample else ""))
    if sample:
        (folder / "warmup").mkdir()
        (folder / "warmup" / "text").write_bytes(packed(sample))
    return folder


def packed(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


def ask(server: Server, model: str, text: bytes, timeout: float = 30.0) -> Answer:
    return server.control.infer(model, [Tensor("text", "BYTES", [1], packed(text))], timeout)


def answers(server: Server, model: str) -> bool:
    """Whether the model works now."""
    try:
        return ask(server, model, b"again").body.endswith(packed(b"again"))
    except NoAnswerError:
        return False


def until(condition: Callable[[], bool], seconds: float = 120.0, between: Callable[[], object] = lambda: None) -> None:
    """Wait for a condition, with something to be done between looks at it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        between()
        time.sleep(0.1)


def leftovers(prefix: str) -> list[str]:
    return sorted(path.name for path in SHARED_MEMORY.glob(f"{prefix}*"))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for whoever asks does not."""
    try:
        return bool(Path("/proc", str(pid), "cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def shared(server_environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server for tests that leave it well."""
    folder = tmp_path_factory.mktemp("server")
    write_model(folder / "models", "echo", sample=b"hello\0there")
    write_model(folder / "models", "pair", count=2)
    with Server(folder / "models", server_environment, log=folder / "log", exit_timeout=2) as server:
        yield server


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def supervisor(shared: Server, heard: list[str]) -> Supervisor:
    return Supervisor(shared, interval=0.2, say=heard.append)


def test_it_answers_on_three_ports_of_this_machine_alone(shared: Server) -> None:
    assert ask(shared, "echo", b"a\0b").body.endswith(packed(b"a\0b"))
    assert shared.control.config("echo")["backend"] == "python"
    with urllib.request.urlopen(shared.metrics_url) as reply:
        assert b"nv_inference_request_success" in reply.read()
    ports = {int(url.split(":")[1].split("/")[0]) for url in (shared.http_url, shared.grpc_url)}
    ports.add(int(shared.metrics_url.split(":")[2].split("/")[0]))
    listening = {
        (int(port, 16), address)
        for file in ("tcp", "tcp6")
        for line in Path("/proc/net", file).read_text().splitlines()[1:]
        for (address, port), state in [(line.split()[1].split(":"), line.split()[3])]
        if state == "0A"
    }
    addresses = {port: address for port, address in listening if port in ports}
    assert addresses.keys() == ports
    assert {address[-8:] for address in addresses.values()} == {"0100007F"}  # 127.0.0.1, also as IPv6 writes it


def test_every_model_is_proved_by_an_inference(supervisor: Supervisor, shared: Server) -> None:
    before = shared.control.counts()
    supervisor.prove()
    after = shared.control.counts()
    assert {model: after[model].all - before[model].all for model in after} == {"echo": 1, "pair": 1}


def test_a_healthy_server_is_left_alone(supervisor: Supervisor, shared: Server, heard: list[str]) -> None:
    stubs = stubs_of(shared.pid)
    assert sorted(stub.model for stub in stubs) == ["echo", "pair", "pair"]
    for _ in range(8):
        supervisor.round()
        time.sleep(0.1)
    assert heard == []
    assert stubs_of(shared.pid) == stubs


def test_a_model_that_serves_is_not_probed(supervisor: Supervisor, shared: Server) -> None:
    supervisor.round()
    until(lambda: ask(shared, "echo", b"x").ok)
    time.sleep(0.3)
    before = shared.control.counts()["echo"]
    for number in range(5):
        ask(shared, "echo", b"x")
        supervisor.round()
        time.sleep(0.1)
        assert shared.control.counts()["echo"].all == before.all + number + 1


def test_a_crashed_model_is_loaded_again(supervisor: Supervisor, shared: Server, heard: list[str]) -> None:
    supervisor.round()
    (crashed,) = (stub for stub in stubs_of(shared.pid) if stub.model == "echo")
    assert supervising.DEAD in ask(shared, "echo", b"die").error
    assert shared.control.ready()  # which is why nobody can go by it
    until(lambda: bool(heard), between=supervisor.round)
    assert heard == ["model 'echo' was loaded again: its process died"]
    assert answers(shared, "echo")
    assert crashed.pid not in [stub.pid for stub in stubs_of(shared.pid)]
    assert not (SHARED_MEMORY / crashed.region).exists()
    assert heard[0] in shared.log.read_text()


def test_one_dead_process_of_two_is_replaced_and_the_model_serves_on(
    supervisor: Supervisor, shared: Server, heard: list[str]
) -> None:
    supervisor.round()
    dead, living = (stub for stub in stubs_of(shared.pid) if stub.model == "pair")
    os.kill(dead.pid, signal.SIGKILL)
    until(lambda: bool(heard), between=supervisor.round)
    assert heard == ["model 'pair' was loaded again: its process died"]
    until(lambda: len([stub for stub in stubs_of(shared.pid) if stub.model == "pair"]) == 2)
    assert all(ask(shared, "pair", b"x").ok for _ in range(6))
    assert living.pid


def test_a_model_that_hangs_is_ended_and_loaded_again(shared: Server, heard: list[str]) -> None:
    supervisor = Supervisor(shared, interval=0.2, patience=5.0, say=heard.append)
    supervisor.round()
    replies: list[Answer] = []
    waiting = threading.Thread(target=lambda: replies.append(ask(shared, "echo", b"hang", 120.0)))
    waiting.start()
    until(lambda: bool(heard), between=supervisor.round)
    waiting.join()
    assert heard == ["model 'echo' was loaded again: it answered nothing for 5 s"]
    assert not replies[0].ok  # the one that hung got an answer after all
    assert answers(shared, "echo")


def test_a_killed_server_is_started_again_on_the_same_ports(
    supervisor: Supervisor, shared: Server, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mended, look_once = threading.Event(), supervisor.round

    def look(stopping: threading.Event | None = None) -> None:
        look_once(stopping)
        if heard:
            mended.set()

    monkeypatch.setattr(supervisor, "round", look)
    urls, first = (shared.http_url, shared.grpc_url, shared.metrics_url), shared.pid
    stopping = threading.Event()
    watching = threading.Thread(target=supervisor.run, args=(stopping,))
    watching.start()
    os.kill(first, signal.SIGKILL)
    assert mended.wait(120)  # a stop before that would end the start
    assert answers(shared, "echo")
    assert heard == ["the server is started again: it ended with code -9"]
    assert (shared.http_url, shared.grpc_url, shared.metrics_url) == urls
    assert shared.pid != first
    stopping.set()
    watching.join()


def test_a_server_that_does_not_answer_is_started_again(shared: Server, heard: list[str]) -> None:
    supervisor = Supervisor(shared, interval=0.2, patience=5.0, say=heard.append)
    supervisor.round()
    first = shared.pid
    os.kill(first, signal.SIGSTOP)
    until(lambda: bool(heard), between=supervisor.round)
    assert "it does not answer" in heard[0]
    assert shared.pid != first
    assert answers(shared, "echo")


def test_a_model_that_loads_for_ever_costs_a_new_server(shared: Server, heard: list[str]) -> None:
    supervisor = Supervisor(shared, interval=0.2, patience=10.0, loading=4.0, say=heard.append)
    incomplete = shared.repository / "pair" / "2"
    incomplete.mkdir()  # without a model.py the server waits for ever
    loading = threading.Thread(target=lambda: pytest.raises(NoAnswerError, shared.control.load, "pair", timeout=120.0))
    loading.start()

    def is_loading() -> bool:
        try:
            return any(state.get("state") == "LOADING" for state in shared.control.states())
        except NoAnswerError:  # asked at the wrong moment, the server waits for the load before it answers
            return True

    until(is_loading)
    incomplete.rmdir()  # which this server does not notice any more; a new one would wait, too
    until(lambda: bool(heard), between=supervisor.round)
    loading.join()
    reasons = ("model 'pair' has been loading for more than 4 s", "it does not answer (timed out)")
    assert heard[0].removeprefix("the server is started again: ") in reasons
    assert answers(shared, "pair")


def test_an_orderly_end_leaves_nothing(server_environment: Environment, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "echo")
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log")
    with server:
        pid, stubs = server.pid, [stub.pid for stub in stubs_of(server.pid)]
        assert leftovers(server._prefix)
        assert ask(server, "echo", b"x").ok
        assert server.stop()
    assert not leftovers(server._prefix)
    assert stubs
    assert not any(map(is_alive, (pid, *stubs)))
    assert server.log.exists()


def test_an_end_that_takes_too_long_is_made_short(server_environment: Environment, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "echo")
    with Server(tmp_path / "models", server_environment, log=tmp_path / "log", exit_timeout=1) as server:
        hanging = threading.Thread(target=lambda: pytest.raises(NoAnswerError, ask, server, "echo", b"hang", 60.0))
        hanging.start()
        until(lambda: "1" in str(server.control._call("GET", "/v2/models/echo/stats").body))
        pid, stubs = server.pid, [stub.pid for stub in stubs_of(server.pid)]
        assert stubs
        assert not server.stop()
    hanging.join()
    assert not leftovers(server._prefix)
    until(lambda: not any(map(is_alive, (pid, *stubs))))


def test_models_import_from_the_environment_whatever_the_working_directory_holds(
    server_environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fssdeploy.py").write_text("raise ValueError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "models", "echo", initialize="import fssdeploy.pipeline")
    with Server("models", server_environment, log=Path("log"), exit_timeout=2) as server:
        assert answers(server, "echo")
    assert (tmp_path / "log").exists()


def test_a_stop_during_the_start_ends_it(server_environment: Environment, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "slow", initialize="time.sleep(600)")
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log")
    stopping = threading.Event()
    timer = threading.Timer(1.5, stopping.set)
    timer.start()
    assert server.start(stopping) is False
    assert server.pid == 0
    assert not leftovers(server._prefix)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "config.pbtxt").write_text('backend: "python" max_batchsize: 1'),
            "echo': Error parsing text",
        ),
        (
            lambda folder: (folder / "1" / "model.py").write_text(
                MODEL.replace("INITIALIZE", "raise ValueError('error[bank_locked]: another process holds it')")
            ),
            "error[bank_locked]: another process holds it",
        ),
        (lambda folder: (folder / "1" / "model.py").unlink() or (folder / "1").rmdir(), "at least one version"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(
    server_environment: Environment, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(write_model(tmp_path / "models", "echo"))
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log", start_timeout=60)
    with pytest.raises(MachineError) as caught:
        server.start()
    assert caught.value.code == "server_start"
    assert words in caught.value.line()
    assert "\\n" not in caught.value.line()
    assert server.pid == 0


def test_models_that_load_for_ever_end_the_start(server_environment: Environment, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "slow", initialize="time.sleep(600)")
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log", start_timeout=2)
    with pytest.raises(MachineError, match="not ready within 2 s"):
        server.start()
    assert server.pid == 0


def test_a_port_taken_by_a_stranger_while_models_load_is_replaced(
    server_environment: Environment, tmp_path: Path
) -> None:
    """The server opens its ports only after that."""
    write_model(tmp_path / "models", "slow", initialize="time.sleep(1.5)")
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log", exit_timeout=1)
    starting = threading.Thread(target=server.start)
    starting.start()
    until(lambda: server.pid != 0)
    first = server.ports
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", first[0]))
        thief.listen()
        starting.join()
        assert server.ports[0] != first[0]
        assert server.control.ready()
    server.stop()


def test_two_servers_that_start_together_take_different_ports(server_environment: Environment, tmp_path: Path) -> None:
    servers = []
    for name in ("first", "second"):
        write_model(tmp_path / name, name)
        servers.append(Server(tmp_path / name, server_environment, log=tmp_path / "log", exit_timeout=1))
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(servers[0].ports).isdisjoint(servers[1].ports)
    assert [answers(*pair) for pair in zip(servers, ("first", "second"), strict=True)] == [True, True]
    assert "Address already in use" not in (tmp_path / "log").read_text()
    for server in servers:
        server.stop()


def test_ports_that_are_free_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("fssdeploy.serving.server.FIRST_PORT", port)
        chosen = choose_ports("127.0.0.1", (None, None, None))
        assert len(set(chosen.numbers)) == 3
        assert port not in chosen.numbers
        other = choose_ports("127.0.0.1", (None, None, None))
        assert set(other.numbers).isdisjoint(chosen.numbers)
        chosen.release()
        assert choose_ports("127.0.0.1", (None, chosen.numbers[1], None)).numbers[1] == chosen.numbers[1]
        with pytest.raises(InputError, match=str(port)) as caught:
            choose_ports("127.0.0.1", (None, port, None))
        assert caught.value.code == "port_in_use"


@pytest.mark.parametrize(("wanted", "code"), [((0, None, None), "port_range"), ((65000, 65000, None), "port_twice")])
def test_ports_without_sense_are_refused(wanted: tuple[int | None, ...], code: str) -> None:
    with pytest.raises(InputError) as caught:
        choose_ports("127.0.0.1", wanted)
    assert caught.value.code == code


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Server(tmp_path, binary=Path("/bin/false"), log=tmp_path / "log").start()
    assert caught.value.code == "repository_missing"


def test_shared_memory_of_a_killed_keeper_is_removed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fssdeploy.serving.server.SHARED_MEMORY", tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    family = f"fssdeploy.{os.stat('/proc/self/ns/pid').st_ino}."
    stays = {f"{family}{os.getpid()}.12.x", f"fssdeploy.1.{ended.pid}.12.x", "fssdeploy_client", "other"}
    for name in {*stays, f"{family}{ended.pid}.12.x"}:
        (tmp_path / name).touch()
    sweep()
    assert {path.name for path in tmp_path.iterdir()} == stays


def test_a_server_that_keeps_failing_is_given_up(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\necho no licence for this; exit 3\n")
    binary.chmod(0o755)
    write_model(tmp_path / "models", "echo")
    server = Server(tmp_path / "models", binary=binary, log=tmp_path / "log")
    with pytest.raises(MachineError, match="exit code 3: no licence for this"):
        server.start()
    monkeypatch.setattr(supervising, "LIMIT", 2)
    with pytest.raises(MachineError) as caught:
        Supervisor(server, say=heard.append).round()
    assert caught.value.code == "server_unstable"
    assert len(heard) == 2
    assert server.pid == 0


def test_probes_are_made_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "picture").write_bytes(bytes(range(12)))
    entry = {"data_type": "TYPE_FP32", "dims": ["3"], "input_data_file": "picture"}
    warm = {"max_batch_size": 4, "model_warmup": [{"inputs": {"x": entry}}], "input": []}
    assert sample(warm, tmp_path) == [Tensor("x", "FP32", [1, 3], bytes(range(12)))]
    cold = {
        "max_batch_size": 0,
        "input": [
            {"name": "a", "data_type": "TYPE_STRING", "dims": [-1, 2]},
            {"name": "b", "data_type": "TYPE_UINT8", "dims": [2, 3], "optional": True},
            {"name": "c", "data_type": "TYPE_INT64", "dims": [-1]},
            {"name": "d", "data_type": "TYPE_BOOL", "dims": [1]},
        ],
    }
    assert sample(cold, tmp_path) == [
        Tensor("a", "BYTES", [1, 2], bytes(8)),
        Tensor("c", "INT64", [1], bytes(8)),
        Tensor("d", "BOOL", [1], bytes(1)),
    ]
    all_optional = {"max_batch_size": 0, "input": [{**entry, "optional": True} for entry in cold["input"]]}
    assert [tensor.name for tensor in sample(all_optional, tmp_path)] == ["a"]


def test_instances_are_counted_over_groups_and_devices() -> None:
    assert instances({"instance_group": [{"count": 2, "gpus": []}, {"count": 3, "gpus": [0, 1]}]}) == 8


def command(*arguments: object, environment: Environment) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fssdeploy", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, SETTING: str(environment.path), "PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(
    server_environment: Environment, tmp_path: Path, number: signal.Signals
) -> None:
    write_model(tmp_path / "models", "echo")
    process = command(tmp_path / "models", "--json", "--log", tmp_path / "log", environment=server_environment)
    assert process.stdout
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()
        text += line
    told = json.loads(text)
    assert told["models"] == ["echo"]
    assert told["log"] == str(tmp_path / "log")
    with urllib.request.urlopen(f"http://{told['http']}/v2/models/echo/ready") as reply:
        assert reply.status == 200
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert not is_alive(told["pid"])


def test_the_server_does_not_outlive_a_killed_command(server_environment: Environment, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "echo")
    process = command(tmp_path / "models", "--log", tmp_path / "log", environment=server_environment)
    assert process.stdout
    line = process.stdout.readline()
    assert line.startswith("serving: http 127.0.0.1:")
    url = line.split()[2].rstrip(",")
    process.kill()
    process.communicate()

    def gone() -> bool:
        try:
            with urllib.request.urlopen(f"http://{url}/v2/health/live", timeout=2):
                return False
        except OSError:
            return True

    until(gone)


def test_flags_of_the_servers_own_are_handed_through(server_environment: Environment, tmp_path: Path) -> None:
    """One request in two is traced into a file."""
    write_model(tmp_path / "models", "echo")
    trace = tmp_path / "trace.json"
    flags = [f"--trace-config={part}" for part in ("level=TIMESTAMPS", "rate=2", "mode=triton", f"triton,file={trace}")]
    with Server(tmp_path / "models", server_environment, log=tmp_path / "log", flags=flags) as server:
        for _ in range(4):
            assert answers(server, "echo")
    traced = json.loads(trace.read_text())
    assert len([each for each in traced if each.get("model_name") == "echo"]) == 2


def test_a_flag_that_the_server_does_not_know_ends_the_start(server_environment: Environment, tmp_path: Path) -> None:
    write_model(tmp_path / "models", "echo")
    with pytest.raises(MachineError) as caught:
        Server(tmp_path / "models", server_environment, log=tmp_path / "log", flags=["--no-such-flag=1"]).start()
    assert caught.value.code == "server_start"
