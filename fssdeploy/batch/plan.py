"""What a batch has to do, fixed before the first item, and which part of it this machine takes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fssdeploy.errors import InputError, IntegrityError, MachineError
from fssdeploy.files import storage_error, write_atomic

FORMAT = "fssdeploy-batch"
PLAN = "plan.json"

# Plain JSON: ``index`` (its place in the plan), ``input`` (what people call it), and what the job needs to know of it.
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """All items, and all that decides on their results. Neither holds anything but JSON."""

    kind: str
    configuration: Mapping[str, Any]
    items: Sequence[Item]

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole plan; every journal carries it."""
        return _sha256(self._description)

    def bind(self, folder: Path) -> None:
        """Make `folder` belong to this plan. InputError if it belongs to another, IntegrityError if it is damaged."""
        path = folder / PLAN
        try:
            there = json.loads(path.read_bytes())
            if there["format"] != FORMAT or not isinstance(there["configuration"], dict):
                raise ValueError("it is of another format")
        except FileNotFoundError:
            # Two machines may come here at once. With one plan they write the same; with two, the journals tell.
            write_atomic(path, json.dumps(self._description, indent=2).encode(), sync=True)
            return
        except OSError as error:
            raise storage_error(error, path) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(
                "batch_damaged", f"'{path}' is damaged", str(error), "Remove its folder and run again."
            ) from error
        if _sha256(there) != self.digest:
            raise self._other(folder.parent, there)

    @cached_property
    def _description(self) -> dict[str, Any]:
        configuration = {**self.configuration, "items": len(self.items), "list of items": _sha256(self.items)}
        return {"format": FORMAT, "version": 1, "kind": self.kind, "configuration": configuration}

    def _other(self, out: Path, there: Mapping[str, Any]) -> InputError:
        # Through JSON, as the other one came.
        ours = {"kind": self.kind, **json.loads(json.dumps(self._description["configuration"]))}
        theirs = {"kind": there.get("kind"), **there["configuration"]}
        changes = [
            f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
            for key in {**ours, **theirs}
            if theirs.get(key) != ours.get(key)
        ]
        why = "; ".join(changes) or "it was begun by another version"
        return InputError("batch_of_other", f"'{out}' holds another batch", why, "Choose another --out.")


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`: every `count`-th item."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """``I/N``. InputError if it is anything else, or I is not within 1 and N."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(
                "shard", f"there is no shard '{text}'", "it is I/N with I from 1 to N", "For example --shard 2/3."
            )
        return Shard(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this shard."""
        return items[self.number - 1 :: self.count]


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, which the system lets go of when the process dies.

    Without `wait`, MachineError ``batch_busy`` if somebody holds it.
    """
    try:
        stream = path.open("ab")
    except OSError as error:
        raise storage_error(error, path) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise MachineError(
                "batch_busy",
                f"'{path.parent.parent}' is being worked on",
                f"another process holds {path.name}",
                "Wait for it, or give every machine its own --shard.",
            ) from error
        except OSError as error:
            raise storage_error(error, path) from error
        yield


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
