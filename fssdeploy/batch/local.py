"""Worker processes on this machine, dealt items in small chunks; one that dies is replaced and loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fssdeploy.batch.journal import FAILED, Journal, read_journal
from fssdeploy.batch.plan import Item
from fssdeploy.batch.worker import CHUNK, Setup, Worker, failure, revive
from fssdeploy.errors import FssError, MachineError

MAX_DEATHS = 2  # of workers, until the item that they were at is given up
MAX_STILLBORN = 3  # workers in a row that die before they can work, until the batch is
EXIT_SECONDS = 10.0  # for a worker that no longer answers to leave by itself, so that its exit code can be told


@dataclass
class _Hand:
    """A worker process as its coordinator sees it; it is at the first of the items dealt to it."""

    process: BaseProcess
    journal: Path
    dealt: deque[Item] = field(default_factory=deque)
    ready: bool = False
    crash: str = ""


class _Crew:
    """All worker processes, and the items that wait for one."""

    def __init__(self, setup: Setup, items: Sequence[Item], finished: Callable[[str], None]) -> None:
        self._setup = setup
        self._waiting = deque(items)
        self._finished = finished
        self._hands: dict[Connection, _Hand] = {}
        self._started: list[BaseProcess] = []
        self._deaths: Counter[int] = Counter()
        self._stillborn = 0

    def work(self, workers: int) -> None:
        try:
            while self._waiting or self._hands:
                while self._waiting and len(self._hands) < workers:
                    self._hire()
                for connection in wait(list(self._hands)):
                    assert isinstance(connection, Connection)
                    self._listen(connection)
        finally:
            # Whatever counts is in the journals; the rest may be killed at any moment.
            for process in self._started:
                process.kill()
                process.join()

    def _hire(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        journal = self._setup.journal_path()
        process = context.Process(target=_serve, args=(self._setup, journal, theirs), daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()  # else its end would never be noticed
        self._started.append(process)
        self._hands[ours] = _Hand(process, journal)
        self._deal(ours)

    def _deal(self, connection: Connection) -> None:
        chunk = [self._waiting.popleft() for _ in range(min(CHUNK, len(self._waiting)))]
        self._hands[connection].dealt.extend(chunk)
        with suppress(OSError):  # it is dead, which the next `wait` tells
            connection.send(chunk)

    def _listen(self, connection: Connection) -> None:
        hand = self._hands[connection]
        try:
            event, value = connection.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of a message
            self._bury(connection)
            return
        if event == "ready":
            hand.ready, self._stillborn = True, 0
        elif event == "refused":
            raise revive(value)
        elif event == "crashed":
            hand.crash = value
        else:
            hand.dealt.popleft()
            self._finished(value)
            if not hand.dealt and self._waiting:
                self._deal(connection)
            elif not hand.dealt:
                del self._hands[connection]
                connection.close()

    def _bury(self, connection: Connection) -> None:
        """Give back what a dead worker has not finished; its journal knows more than its messages."""
        hand = self._hands.pop(connection)
        connection.close()
        hand.process.join(EXIT_SECONDS)
        hand.process.kill()  # if it hangs on its way out
        hand.process.join()
        reason = hand.crash or _cause(hand.process.exitcode)
        states = {entry["index"]: entry["state"] for entry in read_journal(hand.journal, self._setup.plan)}
        while hand.dealt and hand.dealt[0]["index"] in states:
            self._finished(states[hand.dealt.popleft()["index"]])
        if not hand.ready:
            self._stillborn += 1
            if self._stillborn == MAX_STILLBORN:
                raise MachineError(
                    "worker_start",
                    f"{MAX_STILLBORN} workers in a row died before they could work",
                    reason,
                    "Try fewer --workers: each holds its own copy of the network.",
                )
        elif hand.dealt:
            self._blame(hand.dealt[0], reason)
            if self._deaths[hand.dealt[0]["index"]] == MAX_DEATHS:
                hand.dealt.popleft()
        self._waiting.extendleft(reversed(hand.dealt))

    def _blame(self, item: Item, reason: str) -> None:
        self._deaths[item["index"]] += 1
        if self._deaths[item["index"]] == MAX_DEATHS:
            error = MachineError(
                "worker_died",
                f"'{item['input']}' was given up",
                f"{MAX_DEATHS} workers died of it; the last: {reason}",
                "Run again to try once more, or with fewer --workers if memory is short.",
            )
            Journal(self._setup.journal_path(), self._setup.plan).add(failure(item, error))
            self._finished(FAILED)


def process_locally(setup: Setup, items: Sequence[Item], workers: int, finished: Callable[[str], None]) -> None:
    """Finish items in up to `workers` processes; `finished` is told the state of each.

    A worker that dies is replaced, and the item it was at is tried once more, then failed (``worker_died``). Raises
    what `Worker` raises, and MachineError ``worker_start``. When it ends, however it does, no process is left.
    """
    _Crew(setup, items, finished).work(workers)


def _serve(setup: Setup, journal: Path, connection: Connection) -> None:
    """The life of a worker process."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        worker = Worker(setup, journal)
        connection.send(("ready", None))
        while chunk := _next_chunk(connection):
            for item in chunk:
                connection.send(("finished", worker.finish(item)))
        return
    except FssError as error:
        last: tuple[str, Any] = ("refused", error.to_dict())
    except Exception as error:
        last = ("crashed", f"{type(error).__name__}: {error}")
    with suppress(OSError):
        connection.send(last)


def _next_chunk(connection: Connection) -> list[Item]:
    """What the coordinator deals; nothing when it is done."""
    try:
        chunk: list[Item] = connection.recv()
    except EOFError:
        return []
    return chunk


def _leave_with_parent() -> None:
    """A coordinator that is killed cannot stop its workers, and nobody would deal to them again."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started here never sees an interrupt from the keyboard: it is for the coordinator to stop it."""
    resource_tracker.ensure_running()  # comes with the first process, and starting it ends a mask set before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cause(exit_code: int | None) -> str:
    if exit_code and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
