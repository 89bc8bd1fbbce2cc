"""Keeps a server healthy: a crashed model is loaded again, a crashed or wedged server is started again.

The server itself reports ready as long as it runs, even when the process of a model has died or hangs. Judged here are:
the server's process, its answers, models that load for ever, the models' processes as the system lists them, and a
real inference of every model - with its warm-up sample, or with an empty input whose refusal proves life as well.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fssdeploy.errors import FssError, MachineError
from fssdeploy.serving.control import Answer, Counts, NoAnswerError, Tensor
from fssdeploy.serving.server import SHARED_MEMORY, Server

STUB = "triton_python_backend_stub"
DEAD = "is not healthy"  # what the server answers for a model whose process has died
RESTARTED = "restarted"  # a parameter whose change makes the server load a model anew
PROBE_SHARE = 0.02  # of the time, at most, goes into probing one model
LIMIT, WINDOW = 5, 600.0  # restarts of the server within so many seconds, then it is given up
LONGEST_PAUSE = 60.0
BYTES_PER_ELEMENT = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Stub:
    """The process that runs one instance of a Python model, and its shared memory."""

    pid: int
    model: str
    region: str


@dataclass
class Watch:
    """What is known of one model."""

    probe: Future[Answer] | None = None
    since: float = 0.0  # start of the probe, or the last sign of life since
    due: float = 0.0  # when to probe next
    counts: Counts = Counts(0, 0)  # requests answered when last looked at
    short: bool = False  # fewer processes than instances when last looked at
    loading: float = math.inf  # since when it is being loaded
    failures: int = 0  # restarts since it was last well
    not_before: float = 0.0  # of the next restart
    stubs: list[Stub] = field(default_factory=list)  # its living processes
    gone: list[Stub] = field(default_factory=list)  # those that ended since it was last loaded anew


class Supervisor:
    """Looks after `server` every `interval` seconds.

    What does not answer for `patience` seconds is stuck, and so is a model that has been loading for `loading` seconds.
    `say` is told of everything that was found wrong and done about it, one line each.
    """

    def __init__(
        self,
        server: Server,
        *,
        interval: float = 5.0,
        patience: float = 60.0,
        loading: float = 60.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.server = server
        self._interval = interval
        self._patience = patience
        self._loading = loading
        self._say = say
        self._watches: dict[str, Watch] = {}
        self._restarts: deque[float] = deque()
        self._answered = time.monotonic()
        self._sees_stubs = False  # where another user's processes are hidden, the probes must do
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="probe")

    def run(self, stopping: threading.Event) -> None:
        """Look after the server until `stopping` is set. MachineError `server_unstable` when it cannot be kept up."""
        try:
            while not stopping.wait(1.0 if any(watch.short for watch in self._watches.values()) else self._interval):
                self.round(stopping)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def prove(self) -> None:
        """A real inference of every model, once. MachineError `model_dead` names the first that does not answer."""
        control = self.server.control
        for model in self._ready(control.states()):
            config = control.config(model)
            if config.get("platform") == "ensemble":
                continue
            try:
                answer = control.infer(model, sample(config, self.server.repository / model), self._patience)
                problem = answer.error if _is_bad(answer, config) else ""
            except NoAnswerError as error:
                problem = str(error)
            if problem:
                why = f"model '{model}' fails: {problem}"
                raise MachineError("model_dead", "the server is up but not well", why, f"Its log: {self.server.log}")

    def round(self, stopping: threading.Event | None = None) -> None:
        """Look once at everything and mend what is broken."""
        stopping = stopping or threading.Event()
        process = self.server.process
        if process is None or process.poll() is not None:
            self._restart(f"it ended with code {process.returncode if process else 'unknown'}", stopping)
            return
        try:
            self._look()
            self._answered = time.monotonic()
        except NoAnswerError as error:
            if process.poll() is None and time.monotonic() - self._answered > self._patience:
                self._restart(f"it does not answer ({error})", stopping)
        except _WedgedError as error:
            self._restart(str(error), stopping)

    def _look(self) -> None:
        control, now = self.server.control, time.monotonic()
        states = control.states()
        self._check_loading(states, now)
        ready = self._ready(states)
        counts = control.counts()
        stubs = stubs_of(self.server.pid)
        self._sees_stubs = self._sees_stubs or bool(stubs)
        for model, versions in ready.items():
            watch = self._watches.setdefault(model, Watch())
            now_counts = counts.get(model, watch.counts)
            config = control.config(model)
            if not config or config["platform"] == "ensemble":
                continue
            watch.gone += [stub for stub in watch.stubs if stub not in stubs]
            watch.stubs = [stub for stub in stubs if stub.model == model]
            wanted = versions * instances(config) if runs_in_stub(config) and self._sees_stubs else 0
            was_short, watch.short = watch.short, len(watch.stubs) < wanted
            if watch.short and was_short:  # twice, since a reload has moments with fewer
                self._reload(model, watch, "its process died")
            elif not watch.short:
                self._probe(model, watch, config, now_counts, now)
            watch.counts = now_counts
        for model, watch in self._watches.items():
            if model not in ready and watch.failures and now >= watch.not_before:
                self._reload(model, watch, "it could not be loaded")

    def _check_loading(self, states: list[dict[str, str]], now: float) -> None:
        """_WedgedError when a model has been loading for too long: it then blocks every load after it."""
        loading = {state["name"] for state in states if state.get("state") == "LOADING"}
        for model in loading:
            watch = self._watches.setdefault(model, Watch())
            watch.loading = min(watch.loading, now)
            if now - watch.loading > self._loading:
                raise _WedgedError(f"model '{model}' has been loading for more than {self._loading:.0f} s")
        for model, watch in self._watches.items():
            if model not in loading:
                watch.loading = math.inf

    def _ready(self, states: list[dict[str, str]]) -> dict[str, int]:
        """How many versions of each model are ready."""
        found: dict[str, int] = {}
        for state in states:
            if state.get("state") == "READY":
                found[state["name"]] = found.get(state["name"], 0) + 1
        return found

    def _probe(self, model: str, watch: Watch, config: Mapping[str, Any], counts: Counts, now: float) -> None:
        """Begin a probe that is due, or see what became of the one under way."""
        if watch.probe is None:
            if counts.succeeded > watch.counts.succeeded:  # it serves: nothing has to be tried
                watch.due = max(watch.due, now + self._interval)
            elif now >= watch.due:
                inputs = sample(config, self.server.repository / model)
                watch.since = now
                watch.probe = self._pool.submit(self.server.control.infer, model, inputs, 2 * self._patience)
        elif watch.probe.done():
            probe, watch.probe = watch.probe, None
            watch.due = now + max(self._interval, (now - watch.since) / PROBE_SHARE)
            error = probe.exception()
            if isinstance(error, NoAnswerError):
                raise error
            if _is_bad(probe.result(), config):
                self._end(watch)
                self._reload(model, watch, f"it fails ({probe.result().error})")
            else:
                watch.failures = 0
        elif counts.all > watch.counts.all:
            watch.since = now
        elif now - watch.since > self._patience:
            watch.probe = None
            self._end(watch)
            self._reload(model, watch, f"it answered nothing for {self._patience:.0f} s")

    def _end(self, watch: Watch) -> None:
        """End the processes of a model: what hangs would outlive its being loaded anew."""
        for stub in watch.stubs:
            with suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)
        watch.gone += watch.stubs

    def _reload(self, model: str, watch: Watch, why: str) -> None:
        """Load a model anew, in place: its other instances and the ensembles that use it stay.

        Loading a model that has not changed does nothing, so a parameter of its configuration is changed.
        """
        now = time.monotonic()
        if now < watch.not_before:
            return
        watch.failures += 1
        watch.not_before = now + min(2.0**watch.failures, LONGEST_PAUSE)
        watch.short, watch.probe = False, None
        control = self.server.control
        config = control.config(model)
        if config:
            config["parameters"] = {**config.get("parameters", {}), RESTARTED: {"string_value": str(time.time_ns())}}
        try:
            answer = control.load(model, config, self._loading)
            if not answer.ok and config:
                answer = self._load_from_nothing(model)
        except NoAnswerError as error:
            raise _WedgedError(f"model '{model}' could not be loaded again: {error}") from error
        while watch.gone:
            (SHARED_MEMORY / watch.gone.pop().region).unlink(missing_ok=True)
        outcome = "loaded again" if answer.ok else f"not loaded again ({answer.error})"
        self._tell(f"model '{model}' was {outcome}: {why}")

    def _load_from_nothing(self, model: str) -> Answer:
        control = self.server.control
        control.unload(model)
        deadline = time.monotonic() + self._loading
        while time.monotonic() < deadline:
            states = {state.get("state") for state in control.states() if state["name"] == model}
            if states.isdisjoint({"READY", "UNLOADING"}):
                break
            time.sleep(0.2)
        return control.load(model, timeout=self._loading)

    def _restart(self, why: str, stopping: threading.Event) -> None:
        """Start the server again, after growing pauses. MachineError `server_unstable` when it has failed too often."""
        while not stopping.is_set():
            now = time.monotonic()
            while self._restarts and now - self._restarts[0] > WINDOW:
                self._restarts.popleft()
            if len(self._restarts) >= LIMIT:
                what = f"the server failed {LIMIT + 1} times within {WINDOW / 60:.0f} minutes"
                raise MachineError("server_unstable", what, f"at last {why}", f"Its log: {self.server.log}")
            self._restarts.append(now)
            self._tell(f"the server is started again: {why}")
            self.server.kill()
            self._watches.clear()
            stopping.wait(min(2.0 ** (len(self._restarts) - 1) - 1, LONGEST_PAUSE))
            try:
                self.server.start(stopping)
                self._answered = time.monotonic()
                return
            except FssError as error:
                why = error.line()

    def _tell(self, line: str) -> None:
        self.server.note(line)
        self._say(line)


class _WedgedError(Exception):
    """Only a new server helps."""


def stubs_of(server: int) -> list[Stub]:
    """The living processes of the server's Python models; Linux lists them as files."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
        # program, model file, region, its size, its growth, parent, folder, handle, instance, runtime
        if parent == server and Path(words[0]).name == STUB and len(words) > 8:
            found.append(Stub(int(folder.name), words[8].rsplit("_", 2)[0], words[2]))
    return found


def instances(config: Mapping[str, Any]) -> int:
    """How many instances of each version a configuration asks for."""
    groups = config.get("instance_group", [])
    return sum(group["count"] * max(1, len(group.get("gpus", []))) for group in groups)


def runs_in_stub(config: Mapping[str, Any]) -> bool:
    """Whether a model runs in processes of the Python backend."""
    return config.get("backend") == "python" or config.get("runtime") == "model.py"


def has_sample(config: Mapping[str, Any]) -> bool:
    """Whether the model brings a warm-up sample, which it must be able to answer."""
    return bool(config.get("model_warmup"))


def sample(config: Mapping[str, Any], folder: Path) -> list[Tensor]:
    """Inputs for one inference of a model: its first warm-up sample, else the least that the server lets through.

    That is one empty text or one zero for every required input, or for the first input where none is required.
    """
    rows = [1] if config["max_batch_size"] > 0 else []
    if has_sample(config):
        inputs = config["model_warmup"][0]["inputs"]
        return [
            _tensor(name, entry["data_type"], [*rows, *map(int, entry["dims"])], _sample_data(entry, folder))
            for name, entry in inputs.items()
        ]
    required = [entry for entry in config["input"] if not entry.get("optional")] or config["input"][:1]
    return [
        _tensor(entry["name"], entry["data_type"], [*rows, *(max(1, int(dim)) for dim in entry["dims"])], None)
        for entry in required
    ]


def _sample_data(entry: Mapping[str, Any], folder: Path) -> bytes | None:
    file = entry.get("input_data_file")
    return (folder / "warmup" / file).read_bytes() if file else None


def _tensor(name: str, data_type: str, shape: list[int], data: bytes | None) -> Tensor:
    """A tensor of one of the server's types (``TYPE_FP32``), all zero or empty where there are no data."""
    kind = data_type.removeprefix("TYPE_")
    if kind == "STRING":
        return Tensor(name, "BYTES", shape, data if data is not None else bytes(4 * math.prod(shape)))
    width = BYTES_PER_ELEMENT.get(kind.lstrip("BFINTPU"), 1)  # BOOL takes one byte
    return Tensor(name, kind, shape, data if data is not None else bytes(width * math.prod(shape)))


def _is_bad(answer: Answer, config: Mapping[str, Any]) -> bool:
    """Whether an answer to a probe shows that the model does not work.

    A refusal shows life: a full queue, or inputs without sense. Its own warm-up sample a model must be able to take.
    """
    return DEAD in answer.error or (answer.status == 500 and has_sample(config))
