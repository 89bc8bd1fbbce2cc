"""One worker: opens its job once, then finishes items, each in its own journal before it counts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fssdeploy.batch.journal import DONE, FAILED, SUFFIX, Journal
from fssdeploy.batch.plan import Item
from fssdeploy.errors import FssError

CHUNK = 4  # items that a worker is dealt at a time
# What finishes one item and returns its ``facts`` and its ``record``, both JSON.
Work = Callable[[Item], dict[str, Any]]


class UnusableItemError(Exception):
    """An item cannot be read. It is reported as failed, and the rest goes on; any other error ends the batch."""

    def __init__(self, error: FssError) -> None:
        super().__init__(error.line())
        self.error = error


class Job(Protocol):
    """What is done to every item. It travels to other processes, so it holds plain values alone."""

    def open(self, threads: int) -> Work:
        """Load what all items need. The `Work` it returns leaves its files complete and on disk, or none."""
        ...


@dataclass(frozen=True)
class Setup:
    """What every worker of a batch starts from: the folder of the journals, the digest of the plan, its threads."""

    job: Job
    folder: Path
    plan: str
    threads: int

    def journal_path(self) -> Path:
        """A new name for a journal; names sort by time."""
        return self.folder / f"{time.time_ns()}-{secrets.token_hex(4)}{SUFFIX}"


class Worker:
    """Finishes items one after the other. Raises FssError as `Job.open` does, and MachineError for the journal."""

    def __init__(self, setup: Setup, journal: Path) -> None:
        self._work = setup.job.open(setup.threads)
        self._journal = Journal(journal, setup.plan)

    def finish(self, item: Item) -> str:
        """Do one item; whether it is done or failed."""
        try:
            entry = {"index": item["index"], "state": DONE, **self._work(item)}
        except UnusableItemError as unusable:
            entry = failure(item, unusable.error)
        self._journal.add(entry)
        return str(entry["state"])


def failure(item: Item, error: FssError) -> dict[str, Any]:
    """The entry of an item that failed."""
    return {"index": item["index"], "state": FAILED, "error": error.to_dict()}


def revive(error: dict[str, Any]) -> FssError:
    """The error whose `to_dict` came from another process."""
    revived = FssError(error["code"], error["what"], error["why"], error["fix"])
    revived.exit_code = error["exit_code"]
    return revived
