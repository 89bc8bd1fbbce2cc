"""What workers have finished, on disk: JSON lines, in one file for each worker, under a first line that names the plan.

Nobody else ever writes to a worker's file, so a kill costs at most its last line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fssdeploy.batch.plan import FORMAT
from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.files import storage_error, sync_folder

DONE, FAILED, MISSING = "done", "failed", "missing"
SUFFIX = ".jsonl"

# ``index`` and ``state`` of an item; with them ``facts`` (for the manifest) and ``record`` (what the kind of batch
# makes of it) if it is done, or ``error`` if it failed.
Entry = Mapping[str, Any]


class Journal:
    """The file of one worker. MachineError if it cannot be written."""

    def __init__(self, path: Path, plan: str) -> None:
        self.path = path
        try:
            # Unbuffered: a line is in the file when `write` returns.
            self._stream = path.open("xb", buffering=0)
            self.add({"format": FORMAT, "plan": plan})
            sync_folder(path.parent)
        except OSError as error:
            raise storage_error(error, path) from error

    def add(self, entry: Entry) -> None:
        """Append an entry; when this returns, it survives a power failure."""
        try:
            self._stream.write(json.dumps(entry).encode() + b"\n")
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise storage_error(error, self.path) from error


def read_journal(path: Path, plan: str) -> list[Entry]:
    """The entries of a file, as far as they are complete; none if there is no file yet.

    InputError if it belongs to another plan, IntegrityError if a complete line is damaged, MachineError.
    """
    try:
        head, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        if head.endswith(b"\n") and json.loads(head)["plan"] != plan:
            raise InputError(
                "batch_of_other", f"'{path}' belongs to another batch", "it names another plan", "Choose another --out."
            )
        entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if not all(isinstance(entry["index"], int) and entry["state"] in (DONE, FAILED) for entry in entries):
            raise ValueError("a line is no entry")
        return entries
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            "batch_damaged", f"'{path}' is damaged", str(error), "Remove that file and run again."
        ) from error


def read_journals(folder: Path, plan: str) -> dict[int, Entry]:
    """One entry for every item that any worker ever finished: done before failed, and of failures the last.

    Errors as `read_journal`.
    """
    found: dict[int, Entry] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):  # their names begin with the time
        for entry in read_journal(path, plan):
            if found.get(entry["index"], entry)["state"] != DONE or entry["state"] == DONE:
                found[entry["index"]] = entry
    return found
