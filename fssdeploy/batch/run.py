"""A whole batch in its folder: take up what was left, share out the rest, write one manifest of it all."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fssdeploy.batch.journal import DONE, FAILED, MISSING, Entry, read_journals
from fssdeploy.batch.local import process_locally
from fssdeploy.batch.plan import FORMAT, Item, Plan, Shard, locked
from fssdeploy.batch.ray_backend import process_on_ray
from fssdeploy.batch.worker import Job, Setup
from fssdeploy.engines import MAX_THREADS, available_cores
from fssdeploy.errors import InputError
from fssdeploy.files import made_folder, write_atomic

FOLDER = "batch"  # in the folder of the results: plan, journals, locks
MANIFEST = "manifest.json"
MAX_WORKERS = 256
DEFAULT_WORKERS = 8  # where there are as many cores; each worker holds its own copy of the network
ERRORS_SHOWN = 10  # in the notes; the manifest names all

# How items get to workers: setup, items, workers, and who is told the state of each that is finished.
Backend = Callable[[Setup, Sequence[Item], int, Callable[[str], None]], None]
BACKENDS: dict[str, Backend] = {"local": process_locally, "ray": process_on_ray}


@dataclass(frozen=True)
class Means:
    """How a batch is carried out; nothing here changes a result."""

    workers: int
    threads: int
    shard: Shard
    backend: Backend

    @staticmethod
    def choose(workers: int | None, threads: int | None, shard: str, backend: str) -> Means:
        """From a command's options. `threads` of each worker default to the cores divided by `workers`. InputError."""
        if backend not in BACKENDS:
            raise InputError("usage", f"there is no backend '{backend}'", "", f"Choose {' or '.join(BACKENDS)}.")
        for name, value, most in (("workers", workers, MAX_WORKERS), ("threads", threads, MAX_THREADS)):
            if value is not None and not 1 <= value <= most:
                raise InputError(name, f"{value} {name} cannot be used", "", f"Give 1 to {most}.")
        cores = available_cores()
        workers = workers or min(cores, DEFAULT_WORKERS)
        return Means(workers, threads or max(1, cores // workers), Shard.parse(shard), BACKENDS[backend])


@dataclass(frozen=True)
class Outcome:
    """What there is of a batch: one entry for every item of the plan, None where nothing is known yet.

    `seconds` and `finished` are of this run alone, the rest is of all runs and shards.
    """

    plan: Plan
    entries: list[Entry | None]
    seconds: float = 0.0
    finished: int = 0

    def count(self, state: str) -> int:
        return sum(_state(entry) == state for entry in self.entries)

    @property
    def done(self) -> list[Entry]:
        """The entries of what is done, in the order of the plan."""
        return [entry for entry in self.entries if entry and entry["state"] == DONE]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Of the items that failed."""
        return [
            {"input": item["input"], **entry["error"]}
            for item, entry in zip(self.plan.items, self.entries, strict=True)
            if entry and entry["state"] == FAILED
        ]

    @property
    def killers(self) -> bool:
        """Whether an item was given up because workers died of it."""
        return any(error["code"] == "worker_died" for error in self.errors)

    @property
    def complete(self) -> bool:
        return self.count(MISSING) == 0

    def manifest(self) -> dict[str, Any]:
        """Counts, and for every item its input with what came of it."""
        items = [
            {"input": item["input"], "state": _state(entry), **_findings(entry)}
            for item, entry in zip(self.plan.items, self.entries, strict=True)
        ]
        return {
            "format": FORMAT,
            "version": 1,
            "kind": self.plan.kind,
            "configuration": self.plan.configuration,
            "plan": self.plan.digest,
            "complete": self.complete,
            "total": len(items),
            **{state: self.count(state) for state in (DONE, FAILED, MISSING)},
            "items": items,
        }

    def facts(self, out: Path) -> dict[str, Any]:
        """For the report to people."""
        rate = f" ({self.finished / self.seconds:.1f} per second)" if self.finished else ""
        return {
            "done": f"{self.count(DONE)} of {len(self.entries)}",
            "failed": self.count(FAILED),
            "missing": self.count(MISSING),
            "in this run": f"{self.finished} in {self.seconds:.1f} s{rate}",
            "manifest": str(out / MANIFEST),
        }

    def data(self, out: Path) -> dict[str, Any]:
        """For programs."""
        counts = {state: self.count(state) for state in (DONE, FAILED, MISSING)}
        run = {"finished": self.finished, "seconds": self.seconds}
        return {"total": len(self.entries), **counts, "run": run, "errors": self.errors, "manifest": out / MANIFEST}

    def notes(self) -> list[str]:
        """One for each of the first failures, and what is missing."""
        errors = self.errors
        notes = [f"FAILED {error['what']}: {error['why']}".rstrip(": ") for error in errors[:ERRORS_SHOWN]]
        if len(errors) > ERRORS_SHOWN:
            notes.append(f"FAILED {len(errors) - ERRORS_SHOWN} more; the manifest names them.")
        if not self.complete:
            notes.append(f"INCOMPLETE: {self.count(MISSING)} items are left to other shards or to a later run.")
        return notes

    def failure(self) -> InputError | None:
        """The error that the command ends with when items failed."""
        errors = self.errors
        if not errors:
            return None
        what = f"{len(errors)} of {len(self.entries)} items failed"
        return InputError("items_failed", what, f"{errors[0]['what']}: {errors[0]['why']}", errors[0]["fix"])


def run_batch(
    plan: Plan,
    job: Job,
    out: Path,
    means: Means,
    *,
    collect: Callable[[Outcome], None] = lambda _: None,
    usable: Callable[[Entry], bool] = lambda _: True,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Finish the items of a shard that no run has finished yet, in `out`; those that failed are tried again.

    Whatever ends it, the manifest then says what there is of all shards; `collect` is called right before, for files
    of a kind's own, never by two processes at a time. `usable` tells whether what was done is still there.

    Raises InputError ``batch_of_other`` if `out` holds another plan, MachineError ``batch_busy`` if another process
    works on this shard, what the job raises, and what the backend raises.
    """
    folder = out / FOLDER
    start = time.monotonic()
    finished: Counter[str] = Counter()
    with made_folder(folder), locked(folder / f"shard-{str(means.shard).replace('/', '-of-')}.lock", wait=False):
        plan.bind(folder)
        known = read_journals(folder, plan.digest)
        done = {index for index, entry in known.items() if entry["state"] == DONE and usable(entry)}
        todo = [item for item in means.shard.of(plan.items) if item["index"] not in done]

        def tell(state: str) -> None:
            finished[state] += 1
            progress(f"{finished.total()} of {len(todo)} items, {finished[FAILED]} failed")

        try:
            if todo:
                progress(f"starting workers for {len(todo)} items")
                means.backend(Setup(job, folder, plan.digest, means.threads), todo, means.workers, tell)
        finally:
            # The later of two that come here at once sees all that both have done.
            with manifest_lock(out):
                entries = read_journals(folder, plan.digest)
                outcome = Outcome(
                    plan,
                    [entries.get(item["index"]) for item in plan.items],
                    time.monotonic() - start,
                    finished.total(),
                )
                collect(outcome)
                write_atomic(out / MANIFEST, json.dumps(outcome.manifest(), indent=1).encode(), sync=True)
    return outcome


def manifest_lock(out: Path) -> AbstractContextManager[None]:
    """Held by whoever writes what belongs to all shards."""
    return locked(out / FOLDER / "manifest.lock", wait=True)


def _state(entry: Entry | None) -> str:
    return str(entry["state"]) if entry else MISSING


def _findings(entry: Entry | None) -> dict[str, Any]:
    if entry is None:
        return {}
    return {"error": entry["error"]} if entry["state"] == FAILED else entry["facts"]
