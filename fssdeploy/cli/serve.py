"""`fssdeploy serve`: run a Triton Inference Server on a model repository and keep it healthy."""

from __future__ import annotations

import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fssdeploy.cli.common import Json, emit, progress_lines, say, write_out
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.serving.environment import Environment
    from fssdeploy.serving.server import Server

Port = Annotated[int | None, typer.Option(help="Default: a free one, 8000 to 8002 first.")]


def serve(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(help="Model repository, as fssdeploy repo writes it.")] = None,
    setup: Annotated[
        bool, typer.Option("--setup", help="First make the server's private environment, or bring it up to date.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Port = None,
    grpc_port: Port = None,
    metrics_port: Port = None,
    bank: Annotated[
        Path | None, typer.Option(help="Folder of the systems' banks; default: 'bank' beside the repository.")
    ] = None,
    env: Annotated[
        Path | None,
        typer.Option(help="The private environment; default: $FSSDEPLOY_SERVING, else in the user's cache."),
    ] = None,
    server: Annotated[
        Path | None, typer.Option(help="Another tritonserver; default: the one on PATH, else the private one.")
    ] = None,
    backends: Annotated[Path | None, typer.Option(help="Backend directory; default: the server's own.")] = None,
    log: Annotated[Path | None, typer.Option(help="File that the server's output is appended to.")] = None,
    flag: Annotated[
        list[str] | None,
        typer.Option(help="A flag of tritonserver's own, as --flag=--trace-config=rate=100; repeat for more."),
    ] = None,
    exit_timeout: Annotated[
        int, typer.Option(min=1, help="Seconds that requests in progress get when the server is stopped.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Run a Triton Inference Server on DIRECTORY until it is stopped (SIGTERM, Ctrl-C): what fails is started again."""
    from fssdeploy.serving.server import Server

    if directory is None and not setup:
        raise InputError(
            "usage", "serve needs a model repository, or --setup", "", f"See: {context.command_path} --help"
        )
    environment = _set_up(env, as_json, report=directory is None) if setup else None
    if directory is None:
        return
    binary = _binary(server, env)
    running = Server(
        directory,
        None if binary else environment or _environment(env),
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        bank=bank,
        binary=binary,
        backends=backends,
        log=log,
        flags=flag or [],
        exit_timeout=exit_timeout,
    )
    with _stop_signals() as stopping:
        _run(running, stopping, as_json)


def _set_up(path: Path | None, as_json: bool, report: bool) -> Environment:
    from fssdeploy.report import Report
    from fssdeploy.serving.environment import set_up

    start = time.perf_counter()
    with progress_lines(as_json) as progress:
        environment = set_up(path, progress)
    if report:
        facts = {"environment": str(environment.path), "ready in": f"{time.perf_counter() - start:.0f} s"}
        data = {"environment": environment.path, "server": environment.server, **environment.stamp}
        emit(Report("the serving environment is ready", facts, [], [], data), as_json)
    return environment


def _binary(named: Path | None, env: Path | None) -> Path | None:
    """The server to run, None for the private one."""
    if named is not None:
        if not named.is_file():
            raise InputError("server_missing", f"'{named}' is not a file", "", "Name the tritonserver binary.")
        return named.absolute()
    found = shutil.which("tritonserver") if env is None else None
    return Path(found) if found else None


def _environment(path: Path | None) -> Environment:
    from fssdeploy.serving.environment import ready

    return ready(path)


def _run(server: Server, stopping: threading.Event, as_json: bool) -> None:
    from fssdeploy.serving.supervisor import Supervisor

    supervisor = Supervisor(server, say=lambda line: say(f"fssdeploy: {line}"))
    try:
        with progress_lines(as_json) as progress:
            progress("starting the server")
            if not server.start(stopping):
                return
            supervisor.prove()
        _announce(server, as_json)
        supervisor.run(stopping)
    finally:
        orderly = server.stop()
        if not orderly:
            # The server ends so when a client keeps an idle connection open, or after a model's process crashed.
            server.note("the server did not end in time and was killed")


def _announce(server: Server, as_json: bool) -> None:
    from fssdeploy.report import Report

    urls = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
    if as_json:
        models = sorted(state["name"] for state in server.control.states())
        data = {**urls, "models": models, "pid": server.pid, "log": server.log}
        write_out(Report("serving", {}, [], [], data).json())
    else:
        write_out("serving: " + ", ".join(f"{name} {url}" for name, url in urls.items()) + f"; log {server.log}")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, in place of what they do otherwise: stopping a server is no failure."""
    stopping = threading.Event()
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

    # A handler interrupts the main thread, which may just hold the lock of the event it waits for: setting it there
    # would wait for ever. Putting into this queue never waits.
    def wait() -> None:
        arrived.get()
        stopping.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: arrived.put(number)) for number in numbers]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        arrived.put(0)
