"""Worker processes that are killed, crash or never start: every item is finished once, or blamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fssdeploy.batch.local import process_locally
from fssdeploy.batch.run import run_batch
from fssdeploy.errors import FssError, MachineError
from tests.batch.jobs import Notes, attempts, means, plan_of, read_manifest, states

LOCAL = means(process_locally)
NAMES = "abcdefghij"

# A coordinator whose first worker gets stuck at one item.
COORDINATOR = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down an ignored one
from fssdeploy.batch.local import process_locally
from fssdeploy.batch.run import run_batch
from tests.batch.jobs import Notes, means, plan_of
out = Path(sys.argv[1])
run_batch(plan_of("abcdefghij"), Notes(out, {"c": "stuck"}), out, means(process_locally))
"""


def counts(out: Path) -> dict[str, int]:
    return {name: len(by) for name, by in sorted(attempts(out).items())}


def wait_for(out: Path, name: str) -> int:
    """The process that began an item, once one has."""
    until = time.monotonic() + 30
    while name not in attempts(out):
        assert time.monotonic() < until
        time.sleep(0.01)
    return attempts(out)[name][0]


def alive(process: int) -> bool:
    try:
        # One that nobody has waited for still has its number.
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_killed_from_outside_loses_nothing(tmp_path: Path) -> None:
    killer = threading.Thread(target=lambda: os.kill(wait_for(tmp_path, "c"), signal.SIGKILL))
    killer.start()
    outcome = run_batch(plan_of(NAMES), Notes(tmp_path, {"c": "stuck"}), tmp_path, LOCAL)
    killer.join()
    assert outcome.complete and outcome.finished == 10 and set(states(tmp_path).values()) == {"done"}
    assert counts(tmp_path) == {name: 2 if name == "c" else 1 for name in NAMES}
    assert all((tmp_path / f"{name}.txt").read_text() == name for name in NAMES)


def test_an_item_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    acts = {"b": "kill", "d": "kill once", "g": "crash"}
    outcome = run_batch(plan_of(NAMES), Notes(tmp_path, acts), tmp_path, LOCAL)
    assert outcome.complete and outcome.killers and outcome.finished == 10
    assert states(tmp_path) == {name: "failed" if name in "bg" else "done" for name in NAMES}
    assert counts(tmp_path) == {name: 2 if name in acts else 1 for name in NAMES}
    errors = {error["input"]: error for error in read_manifest(tmp_path)["items"] if "error" in error}
    assert {name: each["error"]["code"] for name, each in errors.items()} == {"b": "worker_died", "g": "worker_died"}
    assert "SIGKILL" in errors["b"]["error"]["why"] and "MemoryError: too much" in errors["g"]["error"]["why"]
    assert not any(alive(process) for by in attempts(tmp_path).values() for process in by)


@pytest.mark.parametrize(
    ("acts", "code"),
    [({"open": "refuse"}, "no_space"), ({"open": "kill"}, "worker_start"), ({"b": "refuse"}, "no_space")],
)
def test_what_is_wrong_with_all_items_ends_the_batch(tmp_path: Path, acts: dict[str, str], code: str) -> None:
    with pytest.raises(FssError) as caught:
        run_batch(plan_of("abc"), Notes(tmp_path, acts), tmp_path, means(process_locally, 1))
    assert caught.value.code == code and caught.value.exit_code == MachineError.exit_code
    assert states(tmp_path) == {"a": "done" if "b" in acts else "missing", "b": "missing", "c": "missing"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_coordinator_that_is_stopped_leaves_no_workers_and_is_continued(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", COORDINATOR, str(tmp_path)]
    coordinator = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    stuck = wait_for(tmp_path, "c")
    if number == signal.SIGINT:
        os.kill(stuck, number)  # the keyboard sends it to all; it is for the coordinator alone
        time.sleep(0.3)
        assert alive(stuck)
    coordinator.send_signal(number)
    _, errors = coordinator.communicate(timeout=20)
    assert "SpawnProcess" not in errors and errors.count("Traceback") == (number == signal.SIGINT), errors
    until = time.monotonic() + 10
    while alive(stuck):
        assert time.monotonic() < until
        time.sleep(0.01)
    if number == signal.SIGINT:
        assert states(tmp_path)["c"] == "missing"
    else:
        assert not (tmp_path / "manifest.json").exists()
    before = counts(tmp_path)
    assert run_batch(plan_of(NAMES), Notes(tmp_path), tmp_path, LOCAL).complete
    again = {name: count - before.get(name, 0) for name, count in counts(tmp_path).items()}
    # The other worker may have been stopped at an item, too.
    assert again["c"] == 1 and sum(again.values()) <= 10 - len(before) + 2
    assert set(states(tmp_path).values()) == {"done"}
