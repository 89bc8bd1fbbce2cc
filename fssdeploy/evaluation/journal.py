"""What a run has finished, on disk: JSON lines under a first one that says what they belong to.

Appending line by line means that whatever ends the run costs at most the episode it was in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fssdeploy.errors import InputError, IntegrityError
from fssdeploy.files import storage_error

FORMAT = "fssdeploy-evaluation"


class Journal:
    """Finished episodes by index, and the thresholds of the priors once they are chosen; `open_journal` makes one."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.episodes: dict[int, dict[str, Any]] = {}
        self.thresholds: dict[str, float] = {}
        self._stream = stream

    def add_episode(self, entry: dict[str, Any]) -> None:
        """Keep the entry of episode ``entry["index"]``. MachineError if it cannot be written."""
        self._append(entry)

    def add_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Keep the thresholds. MachineError if they cannot be written."""
        self._append({"thresholds": dict(thresholds)})

    def take(self, line: bytes) -> None:
        """Learn what a line of the file says. ValueError, KeyError or TypeError if it is none of ours."""
        entry = json.loads(line)
        if "thresholds" in entry:
            self.thresholds = {name: float(value) for name, value in entry["thresholds"].items()}
        else:
            self.episodes[int(entry["index"])] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = _line(entry)
        try:
            self._stream.write(line)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.take(line)


@contextmanager
def open_journal(path: Path, binding: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, a new one if there is none; a last line that was cut short is dropped.

    InputError if it was begun under another binding, IntegrityError if a line before the last is damaged, MachineError
    if it cannot be read or written.
    """
    header = _line({"format": FORMAT, "version": 1, "binding": binding})
    try:
        # Unbuffered: a line is in the file when `write` returns, and a failed one does not come back on closing.
        stream = path.open("a+b", buffering=0)
    except OSError as error:
        raise storage_error(error, path) from error
    with stream:
        stream.seek(0)
        data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        journal = Journal(path, stream)
        if whole:
            first, *lines = whole.splitlines(keepends=True)
            if first != header:
                raise _other_run(path, first, binding)
            _take_all(journal, lines)
        elif not header.startswith(data):
            raise _other_run(path, data, binding)
        try:
            stream.truncate(len(whole))
            if not whole:
                stream.write(header)
        except OSError as error:
            raise storage_error(error, path) from error
        yield journal


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _take_all(journal: Journal, lines: list[bytes]) -> None:
    for line in lines:
        try:
            journal.take(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(
                "evaluation_damaged",
                f"'{journal.path}' is damaged",
                f"a line cannot be read ({error})",
                "Remove it and run again.",
            ) from error


def _other_run(path: Path, first: bytes, binding: Mapping[str, Any]) -> InputError:
    """The error that says in what the run that began the file differs."""
    why = "it is not the record of an evaluation"
    try:
        head = json.loads(first)
        if head["format"] == FORMAT:
            there, here = head["binding"], json.loads(json.dumps(binding))
            changes = [
                f"{key} is {there.get(key)} there and {here[key]} here" for key in here if there.get(key) != here[key]
            ]
            why = "; ".join(changes) or "it was written by another version"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return InputError("evaluation_of_other", f"'{path}' is of another run", why, "Choose another --out.")
