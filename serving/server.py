"""One Triton Inference Server as a child process: free ports, loopback, ready or a clear error, a clean end.

Usable in tests and notebooks: ``with Server(repository, environment) as server: ... server.http_url``. Who wants it
watched and mended adds `fssdeploy.serving.supervisor`.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fssdeploy.errors import FssError, InputError, MachineError
from fssdeploy.files import storage_error
from fssdeploy.serving.control import Control, NoAnswerError
from fssdeploy.serving.environment import SETUP, Environment

FIRST_PORT = 8000  # the server's own: HTTP, gRPC and metrics follow each other
PORT_SETS = 300
START_ATTEMPTS = 4
START_SECONDS = 300.0
GRACE_SECONDS = 8.0  # what a stop takes besides waiting for requests
MAX_LOG_BYTES = 20 * 2**20
LONGEST_REASON = 500
SHARED_MEMORY = Path("/dev/shm")
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PR_SET_PDEATHSIG = 1

# Errors in the server's log. The parser's stand alone, and the model they are about in the line after them.
_ERROR_LINE = re.compile(r"^(?:E\d{4} \S+ \d+ |\[libprotobuf ERROR )\S+\] \"?(.*?)\"?$", re.MULTILINE)
# What it logs as errors on every machine without a GPU.
_NOISE = re.compile("CudaDriverHelper|CUDA driver|NVML|DCGM|pinned system memory|unable to create stream")
_ABOUT_MODEL = re.compile("failed to load|Poll failed")
_PORT_TAKEN = re.compile("already in use|failed to start (HTTP|GRPC|Metrics) service", re.IGNORECASE)

_libc = ctypes.CDLL(None, use_errno=True)


class Server:
    """A server of `repository`, in `environment` or from another `binary` with its `backends`.

    Ports that are not given are chosen: 8000 to 8002 if they are free. `bank` is the root folder of the systems' banks
    instead of `bank/` beside the repository; what the server prints is appended to `log`; `flags` are given to it as
    they are, after ours.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        environment: Environment | None = None,
        *,
        host: str = "127.0.0.1",
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        bank: Path | None = None,
        binary: Path | None = None,
        backends: Path | None = None,
        log: Path | None = None,
        flags: Sequence[str] = (),
        exit_timeout: int = 10,
        start_timeout: float = START_SECONDS,
    ) -> None:
        if binary is None and environment is None:
            raise MachineError("server_missing", "there is no Triton Inference Server", "", f"Run: {SETUP}")
        self.repository = Path(repository).absolute()
        self.environment = environment
        self.host = _numeric(host)
        self._wanted_ports = (http_port, grpc_port, metrics_port)
        self._ports: Ports | None = None
        self._bank = bank
        self._binary = binary
        self._backends = backends
        self.log = (log or default_log()).absolute()
        self._flags = tuple(flags)
        self._exit_timeout = exit_timeout
        self._start_timeout = start_timeout
        self._prefix = f"{_family()}{os.getpid()}.{secrets.token_hex(4)}."
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def ports(self) -> tuple[int, int, int]:
        """HTTP, gRPC and metrics; zeros before the first start."""
        return self._ports.numbers if self._ports else (0, 0, 0)

    @property
    def http_url(self) -> str:
        """host:port, as tritonclient wants it."""
        return self._url(0)

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient wants it."""
        return self._url(1)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads the metrics."""
        return f"http://{self._url(2)}/metrics"

    @property
    def control(self) -> Control:
        """The server's own interface."""
        return Control(_reachable(self.host), self.ports[0])

    @property
    def pid(self) -> int:
        """The server's process; 0 if there is none."""
        return self.process.pid if self.process else 0

    def start(self, stopping: threading.Event | None = None) -> bool:
        """Start and wait until every model is ready. False, with nothing running, when `stopping` was set meanwhile.

        Ports that were chosen once are kept over later starts. Raises InputError (repository, ports) and MachineError.
        """
        self._check_repository()
        sweep()
        stopping = stopping or threading.Event()
        if self._ports and self._ports.held:
            return self._start(stopping)
        for attempt in range(START_ATTEMPTS):
            self._ports = choose_ports(self.host, self._wanted_ports, scatter=attempt > 0)
            try:
                return self._start(stopping)
            except _PortTakenError as error:  # by a stranger, while the models were being loaded
                self._ports.release()
                if None not in self._wanted_ports or attempt == START_ATTEMPTS - 1:
                    raise MachineError("port_in_use", "a port is in use", str(error), "Choose others.") from error
            except BaseException:
                self._ports.release()
                raise
        raise AssertionError("unreachable")

    def stop(self) -> bool:
        """End the server: requests in progress get `exit_timeout` seconds. True if it ended by itself and in order."""
        if self.process is None:
            return True
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(self._exit_timeout + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        if self._ports:
            self._ports.release()
        return code == 0

    def kill(self) -> None:
        """End the server and its models' processes at once, and remove the shared memory they leave behind."""
        if self.process is not None:
            with suppress(ProcessLookupError):  # the group outlives its leader if a model's process does
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        for region in SHARED_MEMORY.glob(f"{self._prefix}*"):
            region.unlink(missing_ok=True)

    def note(self, line: str) -> None:
        """Write a line of ours into the log."""
        with suppress(OSError), self.log.open("a", encoding="utf-8") as stream:
            print(time.strftime("%Y-%m-%dT%H:%M:%S"), "fssdeploy:", line, file=stream)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _url(self, which: int) -> str:
        host = _reachable(self.host)
        return f"[{host}]:{self.ports[which]}" if ":" in host else f"{host}:{self.ports[which]}"

    def _check_repository(self) -> None:
        if not any(self.repository.glob("*/config.pbtxt")):
            raise InputError(
                "repository_missing",
                f"'{self.repository}' is not a model repository",
                "no folder in it holds a config.pbtxt",
                "Make one: fssdeploy repo ARTIFACT -o DIR",
            )

    def _start(self, stopping: threading.Event) -> bool:
        written = self._spawn()
        try:
            arrived = self._wait_ready(stopping, written)
        except BaseException:
            self.kill()
            raise
        if not arrived:
            self.kill()  # while models are loading, the server knows no orderly end
        return arrived

    def _spawn(self) -> int:
        """Start the process; returns how long the log was before."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES:
                self.log.replace(self.log.with_name(f"{self.log.name}.1"))
            with self.log.open("ab") as stream:
                written = stream.seek(0, os.SEEK_END)
                self.process = subprocess.Popen(
                    self._command(),
                    env=self._variables(),
                    cwd="/",  # the backend's Python imports from its working directory first
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in a terminal is for us, who then stop it in order
                    preexec_fn=_die_with_parent if _in_main_thread() else None,  # noqa: PLW1509 - one system call
                )
        except OSError as error:
            raise storage_error(error, error.filename or self.log) from error
        return written

    def _command(self) -> list[str]:
        binary, backends, caches = self._binary, self._backends, None
        if binary is None:
            assert self.environment
            binary, caches = self.environment.server, self.environment.caches
            backends = backends or self.environment.backends
        http, grpc, metrics = self.ports
        options: dict[str, object] = {
            "id": self._prefix,
            "model-repository": self.repository,
            "model-control-mode": "explicit",
            "load-model": "*",
            "exit-timeout-secs": self._exit_timeout,
            "http-address": self.host,
            "grpc-address": self.host,
            "metrics-address": self.host,
            "http-port": http,
            "grpc-port": grpc,
            "metrics-port": metrics,
            "log-info": "false",
            "log-warning": "false",
        }
        if backends:
            options["backend-directory"] = backends.absolute()
        if caches:
            options["cache-directory"] = caches
        if not Path("/dev/nvidiactl").exists():
            options |= {"allow-gpu-metrics": "false", "pinned-memory-pool-byte-size": 0}
        command = [
            str(binary),
            "--disable-auto-complete-config",
            *(f"--{key}={value}" for key, value in options.items()),
        ]
        # The stand-in for onnxruntime is a Python backend too, and names its shared memory by its own setting.
        shared = ("python", "onnxruntime") if self.environment else ("python",)
        command += [f"--backend-config={name},shm-region-prefix-name={self._prefix}" for name in shared]
        return command + list(self._flags)

    def _variables(self) -> Mapping[str, str]:
        variables = {**dict.fromkeys(ONE_THREAD, "1"), "LANG": "C.UTF-8", **os.environ}
        if self._binary is None and self.environment:
            variables |= self.environment.variables()
            variables.pop("VIRTUAL_ENV", None)
        if self._bank:
            variables["FSSDEPLOY_BANK"] = str(self._bank.absolute())
        return variables

    def _wait_ready(self, stopping: threading.Event, written: int) -> bool:
        assert self.process
        deadline = time.monotonic() + self._start_timeout
        while not stopping.wait(0.1):
            code = self.process.poll()
            if code is not None:
                raise self._not_started(f"it ended with exit code {code}", written)
            with suppress(NoAnswerError):
                if self.control.name() == self._prefix and self.control.ready():
                    return True
            if time.monotonic() > deadline:
                raise self._not_started(f"its models were not ready within {self._start_timeout:.0f} s", written)
        return False

    def _not_started(self, what: str, written: int) -> FssError | _PortTakenError:
        """The error for a server that did not become ready; its own words are in the log after byte `written`."""
        with self.log.open("rb") as stream:
            stream.seek(written)
            words = reason(stream.read().decode(errors="replace"))
        if _PORT_TAKEN.search(words):
            return _PortTakenError(words)
        return MachineError(
            "server_start",
            "the server did not start",
            f"{what}: {words}" if words else what,
            f"Its log: {self.log}",
        )


class _PortTakenError(Exception):
    pass


class Ports:
    """Three ports, claimed against every other server of this package until `release`.

    A server opens its ports only when its models are loaded; without the claims two that start together would choose
    the same. A claim is a name among the system's abstract sockets, which ends with the process at the latest.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = (numbers[0], numbers[1], numbers[2])
        self._claims: list[socket.socket] = []

    @property
    def held(self) -> bool:
        return bool(self._claims)

    def claim(self) -> bool:
        """False, with nothing claimed, when another has claimed one of them."""
        for number in self.numbers:
            self._claims.append(socket.socket(socket.AF_UNIX))
            try:
                self._claims[-1].bind(f"\0fssdeploy.port.{number}")
            except OSError:
                self.release()
                return False
        return True

    def release(self) -> None:
        while self._claims:
            self._claims.pop().close()


def choose_ports(host: str, wanted: Sequence[int | None], *, scatter: bool = False) -> Ports:
    """Three ports that are free now: those wanted, and for each None one from the first free set of three.

    `scatter` begins the search somewhere at random. Raises InputError `port_in_use` for a wanted one that is not free.
    """
    given = [port for port in wanted if port is not None]
    for port in given:
        if not 1 <= port <= 65535:
            raise InputError("port_range", f"{port} is not a port", "", "Give 1 to 65535.")
        if not _is_free(host, port):
            raise InputError("port_in_use", f"port {port} is in use on {host}", "", "Choose another, or name none.")
    if len(set(given)) < len(given):
        raise InputError("port_twice", "a port is named twice", "", "HTTP, gRPC and metrics need one each.")
    first = random.randrange(PORT_SETS) if scatter else 0
    for number in range(PORT_SETS):
        base = FIRST_PORT + 3 * ((first + number) % PORT_SETS)
        ports = Ports([base + place if port is None else port for place, port in enumerate(wanted)])
        if len(set(ports.numbers)) == 3 and ports.claim():
            if all(_is_free(host, port) for port in ports.numbers):
                return ports
            ports.release()
    raise MachineError("no_port", f"no free ports were found on {host}", "", "Name others: --http-port and so on.")


def sweep() -> None:
    """Remove the shared memory of servers whose keeper was killed before it could."""
    for region in SHARED_MEMORY.glob(f"{_family()}*"):
        keeper = region.name.removeprefix(_family()).partition(".")[0]
        if not Path("/proc", keeper).exists():
            with suppress(OSError):
                region.unlink()


def default_log() -> Path:
    """fssdeploy/serve.log in the user's folder for such files."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "fssdeploy" / "serve.log"


def _family() -> str:
    """How the shared memory of all our servers is named whose process numbers mean the same as ours.

    Containers may share the memory and number their processes each for itself.
    """
    return f"fssdeploy.{os.stat('/proc/self/ns/pid').st_ino}."


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that somebody has just left is free
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _numeric(host: str) -> str:
    """The address of a host of this machine, as the server wants it. Raises InputError."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError("host_unknown", f"'{host}' is no address of this machine", str(error), "") from error
    addresses = [str(entry[4][0]) for entry in found]
    return next((address for address in addresses if ":" not in address), addresses[0])


def _reachable(host: str) -> str:
    """Where a server that listens on `host` can be reached from here."""
    if ipaddress.ip_address(host).is_unspecified:
        return "::1" if ":" in host else "127.0.0.1"
    return host


def reason(log: str) -> str:
    """The one error in what the server printed that says why it did not start, on one line; else its last line."""
    found = [words for words in _ERROR_LINE.findall(log) if not _NOISE.search(words)]
    about_model = [words for words in found if _ABOUT_MODEL.search(words)]
    if found and found[0].startswith("Error parsing"):
        chosen = ": ".join([*(words.partition(":")[0] for words in about_model[:1]), found[0]])
    else:
        chosen = (about_model or found or log.strip().splitlines()[-1:] or [""])[0]
    # The server escapes line breaks; after an exception's message comes where it happened.
    chosen = chosen.partition("\\n\\nAt:")[0].replace("\\n", " ")
    return chosen if len(chosen) <= LONGEST_REASON else f"{chosen[:LONGEST_REASON]}..."


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _die_with_parent() -> None:
    """In the child: end in order when the process that looks after it is gone, whatever ended that.

    To the system, the parent is the thread that started the child.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
