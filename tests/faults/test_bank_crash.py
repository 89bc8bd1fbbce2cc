"""Kill a process at every step of every change to a bank, and at random moments: old or new, never a mixture."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.bank import Bank
from fssdeploy.protocol import ClassState

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

FINGERPRINT = "f" * 64

# Imports once and forks a child for every command, which makes a kill cost milliseconds. The profile hook of the
# interpreter sees each call into C (fsync, replace, every statement of SQLite, ...), so it finds the steps by itself;
# Python's own functions and types (len, list.append, ...) are passed over, since they change nothing but memory.
NURSERY = """
import json, os, signal, sys, traceback
import numpy as np
from fssdeploy.bank import Bank
from fssdeploy.protocol import ClassState

def state(value):
    return ClassState({"mean": np.full(64, value, np.float64)}, 1, "f" * 64, {})

def act(bank, verb, value):
    if verb in ("put", "extend"):
        getattr(bank, verb)("cup", state(value))
    elif verb == "remove":
        bank.remove("cup")
    elif verb == "prune":
        bank.prune()

def die_at(number):
    calls = 0
    def count(frame, event, function):
        nonlocal calls
        if event == "c_call" and (function.__module__ or type(function.__self__).__module__) != "builtins":
            calls += 1
            if calls == number:
                os.write(1, (function.__name__ + " ").encode())
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)

def child(command):
    if command["verb"] == "loop":
        with Bank.open(command["bank"], "f" * 64) as bank:
            for value in range(command["value"], 10**9):
                version = bank.put("cup", state(value))
                os.write(1, f"{version} {value}\\n".encode())
    if command["verb"] == "create":
        die_at(command["number"])
        Bank.open(command["bank"], "f" * 64, create=True)
    else:
        bank = Bank.open(command["bank"], "f" * 64)
        die_at(command["number"])
        act(bank, command["verb"], command["value"])
    sys.setprofile(None)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            print(os.getpid(), flush=True)
            child(json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else "failed" if status else "done", flush=True)
"""


class Nursery:
    """Starts children that work on a bank; each either ends by itself or is killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self, **command: object) -> int:
        """Begin a command; returns the process id of the child."""
        self._process.stdin.write(json.dumps(command) + "\n")
        return int(self._process.stdout.readline())

    def read(self) -> list[str]:
        return self._process.stdout.readline().split()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()


def state_of(value: float) -> ClassState:
    return ClassState({"mean": np.full(64, value, np.float64)}, 1, FINGERPRINT, {})


def content(bank: Bank) -> dict[int, float]:
    """Version -> value of every version of the one class, all of them read; a mixed state fails."""
    if not bank.names():
        return {}
    values = {}
    for info in bank.versions("cup"):
        mean = bank.get("cup", info.version).tensors["mean"]
        assert np.unique(mean).size == 1
        values[info.version] = float(mean[0])
    return values


def files(directory: Path) -> int:
    return len(list((directory / "states").iterdir()))


AFTER = {
    "put": lambda before, value: {**before, max(before) + 1: value},
    "extend": lambda before, value: {**before, max(before) + 1: (before[max(before)] + value) / 2},
    "remove": lambda before, value: {},
    "prune": lambda before, value: {max(before): before[max(before)]},
}


@pytest.mark.parametrize("verb", AFTER)
def test_killed_at_every_step(tmp_path, nursery, verb):
    directory = tmp_path / "bank"
    with Bank.open(directory, FINGERPRINT, create=True) as bank:
        bank.put("cup", state_of(0))
    outcomes, functions, number, ended = set(), set(), 0, False
    while not ended:
        number += 1
        with Bank.open(directory, FINGERPRINT) as bank:
            bank.put("cup", state_of(number + 0.5))
            before = content(bank)
        assert len(before) == 2
        nursery.start(verb=verb, bank=str(directory), number=number, value=float(number))
        *function, outcome = nursery.read()
        assert outcome in ("killed", "done")
        ended = outcome == "done"
        functions.update(function)

        after = AFTER[verb](before, float(number))
        with Bank.open(directory, FINGERPRINT) as bank:
            found = content(bank)
            assert found in (before, after), f"killed at call {number} ({function})"
            assert bank.verify() == []
            outcomes.add("new" if found == after else "old")
            version = bank.put("cup", state_of(-number))
            assert version > max(before)
            assert bank.get("cup").tensors["mean"][0] == -number
            bank.prune()
            assert content(bank) == {version: -number}
        assert files(directory) == 1
        assert not list(directory.glob("*journal"))
    assert found == after
    assert outcomes == {"old", "new"}
    assert "execute" in functions
    if verb in ("put", "extend"):
        assert {"fsync", "replace", "open"} < functions


def test_killed_at_every_step_of_making_a_bank(tmp_path, nursery):
    number, ended, kept = 0, False, set()
    while not ended:
        number += 1
        directory = tmp_path / str(number)
        nursery.start(verb="create", bank=str(directory), number=number)
        outcome = nursery.read()[-1]
        assert outcome in ("killed", "done")
        ended = outcome == "done"
        kept.add((directory / "index.sqlite").exists())
        with Bank.open(directory, FINGERPRINT, create=True) as bank:
            assert bank.names() == []
            assert bank.put("cup", state_of(1)) == 1
            assert bank.verify() == []
    assert kept == {True, False}


def test_a_version_is_on_disk_before_the_row_that_names_it(tmp_path, monkeypatch):
    """A kill cannot show this, only a power failure could: every step is flushed before the next begins."""
    steps: list[str] = []
    connect, fsync, replace = sqlite3.connect, os.fsync, os.replace

    def connect_traced(*args, **options) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_trace_callback(lambda sql: steps.append(sql.split()[0]))
        return connection

    def fsync_traced(descriptor: int) -> None:
        steps.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def replace_traced(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(sqlite3, "connect", connect_traced)
    monkeypatch.setattr(os, "fsync", fsync_traced)
    monkeypatch.setattr(os, "replace", replace_traced)
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        for change in (bank.put, bank.extend):
            steps.clear()
            change("cup", state_of(1))
            assert steps[0] == "BEGIN"
            assert steps[-4:] == ["flush file", "rename", "flush folder", "COMMIT"]
            assert steps.count("COMMIT") == 1
        with bank._index.reading() as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "while another process has the bank open"])
def test_killed_at_random_moments(tmp_path, nursery, watched):
    directory = tmp_path / "bank"
    rng = random.Random(20)
    Bank.open(directory, FINGERPRINT, create=True).close()
    watcher = Bank.open(directory, FINGERPRINT)
    if not watched:
        watcher.close()
    reported_in_all = 0
    for turn in range(30):
        with Bank.open(directory, FINGERPRINT) as bank:
            bank.prune()
            before = content(bank)
        first_value = 100_000 * (turn + 1)
        child = nursery.start(verb="loop", bank=str(directory), value=first_value)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        reported = {}
        while (line := nursery.read()) != ["killed"]:
            assert line != ["failed"]
            reported[int(line[0])] = float(line[1])

        with Bank.open(directory, FINGERPRINT) as bank:
            assert bank.verify() == []
            found = content(bank)
        assert reported.items() <= found.items()
        # The child may have been killed between its last commit and its report, and no further.
        new = {version: value for version, value in found.items() if version not in before}
        assert before.items() <= found.items()
        assert len(new) - len(reported) in (0, 1)
        assert sorted(new.items()) == [
            (max(before, default=0) + 1 + step, first_value + step) for step in range(len(new))
        ]
        if watched:
            assert content(watcher) == found
        reported_in_all += len(reported)
    watcher.close()
    assert reported_in_all > 20  # the kills met a bank at work
