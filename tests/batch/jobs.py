"""A job without a network, and a backend without processes, to see what becomes of workers and items."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fssdeploy.batch.plan import Item, Plan, Shard
from fssdeploy.batch.run import Backend, Means
from fssdeploy.batch.worker import Setup, UnusableItemError, Work, Worker
from fssdeploy.errors import InputError, MachineError


@dataclass(frozen=True)
class Notes:
    """Writes the name of every item into a file of its own, and one line for each attempt into ``attempts``.

    `acts` says what else happens at an item: ``kill`` (the worker, every time), ``kill once``, ``crash``, ``stuck``
    (once), ``unreadable``, ``refuse``; at the item ``open``, before any item.
    """

    out: Path
    acts: Mapping[str, str] = field(default_factory=dict)

    def open(self, threads: int) -> Work:
        self._act("open")
        return self._finish

    def _finish(self, item: Item) -> dict[str, Any]:
        with (self.out / "attempts").open("a") as stream:
            stream.write(f"{item['input']} {os.getpid()}\n")
        self._act(item["input"])
        (self.out / f"{item['input']}.txt").write_text(item["input"])
        return {"facts": {"outputs": [f"{item['input']}.txt"]}, "record": item["index"]}

    def _act(self, name: str) -> None:
        act = self.acts.get(name, "")
        first = len(attempts(self.out).get(name, ())) <= 1
        if act == "kill" or (act == "kill once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "crash":
            raise MemoryError("too much")
        if act == "stuck" and first:
            time.sleep(60)
        if act == "unreadable":
            raise UnusableItemError(InputError("file_empty", f"'{name}' is empty", "it has zero bytes"))
        if act == "refuse":
            raise MachineError("no_space", "there is no space", "the disk is full", "Free some.")


def attempts(out: Path) -> dict[str, list[int]]:
    """The processes that began each item."""
    found: dict[str, list[int]] = {}
    if (out / "attempts").exists():
        for line in (out / "attempts").read_text().splitlines():
            name, process = line.split()
            found.setdefault(name, []).append(int(process))
    return found


def plan_of(names: str, **configuration: object) -> Plan:
    return Plan("notes", configuration, [{"index": index, "input": name} for index, name in enumerate(names)])


def in_process(setup: Setup, items: Sequence[Item], workers: int, finished: Callable[[str], None]) -> None:
    """All items by one worker of this process."""
    worker = Worker(setup, setup.journal_path())
    for item in items:
        finished(worker.finish(item))


def means(backend: Backend = in_process, workers: int = 2, shard: str = "1/1") -> Means:
    return Means(workers, 1, Shard.parse(shard), backend)


def read_manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def states(out: Path) -> dict[str, str]:
    """What the manifest says of each item."""
    return {item["input"]: item["state"] for item in read_manifest(out)["items"]}
