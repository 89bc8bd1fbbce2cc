"""Several processes and threads at one bank."""

import multiprocessing
import os
import sqlite3
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fssdeploy.bank.bank as bank_module
from fssdeploy.bank import Bank
from fssdeploy.errors import InputError
from fssdeploy.protocol import ClassState

FINGERPRINT = "f" * 64


def state_of(value: float, shots: int = 1) -> ClassState:
    return ClassState({"mean": np.full(16, value, np.float64)}, shots, FINGERPRINT, {})


def put_many(directory: Path, worker: int, count: int) -> list[int]:
    with Bank.open(directory, FINGERPRINT, create=True) as bank:
        return [bank.put("cup", state_of(1000 * worker + number)) for number in range(count)]


def extend_many(directory: Path, worker: int, count: int) -> list[int]:
    with Bank.open(directory, FINGERPRINT) as bank:
        return [bank.extend("cup", state_of(worker)) for _ in range(count)]


def put_and_read(directory: Path, worker: int, stop: Path) -> list[int]:
    """While another prunes: what was just put must be readable, or already replaced by a newer version."""
    versions: list[int] = []
    try:
        with Bank.open(directory, FINGERPRINT) as bank:
            while not stop.exists():
                # Every third state is the same for all: its file appears and disappears under the pruner's eyes.
                state = state_of(7 if len(versions) % 3 == 0 else 1000 * worker + len(versions))
                versions.append(bank.put(f"class {worker % 2}", state))
                bank.get(f"class {worker % 2}")
    finally:
        stop.touch()
    return versions


def prune_many(directory: Path, files: int, stop: Path) -> int:
    removed = 0
    try:
        with Bank.open(directory, FINGERPRINT) as bank:
            while removed < files and not stop.exists():
                removed += bank.prune(keep=1).files
    finally:
        stop.touch()
    return removed


@pytest.fixture
def processes():
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_processes_that_put_the_same_class_get_distinct_versions(tmp_path, processes):
    directory = tmp_path / "bank"  # made by whoever comes first
    results = [processes.submit(put_many, directory, worker, 25) for worker in range(4)]
    given = [result.result() for result in results]
    assert sorted(number for numbers in given for number in numbers) == list(range(1, 101))
    with Bank.open(directory, FINGERPRINT) as bank:
        assert bank.verify() == []
        for worker, numbers in enumerate(given):
            assert numbers == sorted(numbers)
            for number, version in enumerate(numbers):
                assert bank.get("cup", version).tensors["mean"][0] == 1000 * worker + number


def test_no_shot_is_lost_when_processes_extend_the_same_class(tmp_path, processes):
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", state_of(0))
        results = [processes.submit(extend_many, bank.directory, worker, 10) for worker in range(4)]
        assert sorted(number for result in results for number in result.result()) == list(range(2, 42))
        newest = bank.get("cup")
        assert newest.shots == 41
        np.testing.assert_allclose(newest.tensors["mean"], 10 * (0 + 1 + 2 + 3) / 41, rtol=1e-12)


def test_pruning_never_takes_a_file_that_is_being_put(tmp_path, processes):
    stop = tmp_path / "stop"
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        results = [processes.submit(put_and_read, bank.directory, worker, stop) for worker in range(3)]
        pruner = processes.submit(prune_many, bank.directory, 30, stop)
        versions = [result.result() for result in results]
        assert pruner.result() >= 30
        together = sorted(versions[0] + versions[2])
        assert together == list(range(1, len(together) + 1))
        assert bank.verify() == []
        bank.prune()
        assert len(list((bank.directory / "states").iterdir())) == len(
            {bank.versions(name)[0].sha256 for name in bank.names()}
        )


def test_bank_is_shared_by_threads(tmp_path):
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank, ThreadPoolExecutor(8) as threads:

        def work(worker: int) -> list[int]:
            numbers = []
            for _ in range(10):
                numbers.append(bank.put("cup", state_of(worker)))
                bank.get("cup")
                bank.names()
            return numbers

        numbers = [number for given in threads.map(work, range(8)) for number in given]
        assert sorted(numbers) == list(range(1, 81))
        assert bank.verify() == []


def test_a_writer_in_the_middle_never_blocks_a_reader(tmp_path, monkeypatch):
    """The writer is another thread of the same bank, stopped between writing the file and committing."""
    written, go_on = threading.Event(), threading.Event()
    write = bank_module.write_atomic

    def write_and_wait(*args, **options) -> None:
        write(*args, **options)
        written.set()
        assert go_on.wait(20)

    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank, ThreadPoolExecutor(1) as threads:
        bank.put("cup", state_of(1))
        with monkeypatch.context() as patched:
            patched.setattr(bank_module, "write_atomic", write_and_wait)
            result = threads.submit(bank.put, "cup", state_of(2))
            try:
                assert written.wait(20)
                started = time.monotonic()
                for reader in (bank, Bank.open(bank.directory, FINGERPRINT)):
                    assert reader.get("cup").tensors["mean"][0] == 1
                    assert reader.names() == ["cup"]
                    assert len(reader.versions("cup")) == 1
                    assert reader.verify() == []
                assert time.monotonic() - started < 5
            finally:
                go_on.set()
            assert result.result() == 2
        assert bank.get("cup").tensors["mean"][0] == 2


def test_pruning_waits_for_a_put_that_has_written_its_file(tmp_path, monkeypatch):
    written, go_on = threading.Event(), threading.Event()
    write = bank_module.write_atomic

    def write_and_wait(*args, **options) -> None:
        write(*args, **options)
        written.set()
        assert go_on.wait(20)

    monkeypatch.setattr(bank_module, "write_atomic", write_and_wait)
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank, ThreadPoolExecutor(2) as threads:
        putting = threads.submit(bank.put, "cup", state_of(1))
        try:
            assert written.wait(20)
            pruning = threads.submit(bank.prune)
            time.sleep(0.2)
            assert not pruning.done()
        finally:
            go_on.set()
        assert putting.result() == 1
        assert pruning.result().files == 0
        assert bank.get("cup").tensors["mean"][0] == 1


def test_pruning_looks_and_deletes_under_one_write_lock(tmp_path, monkeypatch):
    """So that no put can write a file, or commit its row, between the two: the race itself is too rare to wait for."""
    steps: list[str] = []
    connect, unlink = sqlite3.connect, Path.unlink

    def connect_traced(*args, **options) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_trace_callback(lambda sql: steps.append(" ".join(sql.split()[:2])))
        return connection

    def unlink_traced(path: Path) -> None:
        steps.append("unlink")
        other = connect(tmp_path / "bank" / "index.sqlite", timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()
        unlink(path)

    monkeypatch.setattr(sqlite3, "connect", connect_traced)
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", state_of(1))
        bank.put("cup", state_of(2))
        steps.clear()
        monkeypatch.setattr(Path, "unlink", unlink_traced)
        assert bank.prune().files == 1
    removal = ["BEGIN IMMEDIATE", "DELETE FROM", "COMMIT"]
    assert steps == [*removal, "BEGIN IMMEDIATE", "SELECT sha256", "unlink", "COMMIT"]


@pytest.mark.parametrize("outcome", ["newer", "gone"])
def test_a_get_that_races_with_a_removal(tmp_path, monkeypatch, outcome):
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", state_of(1))
        read, races = Path.read_bytes, []

        def remove_then_read(path: Path) -> bytes:
            if not races:
                races.append(path)
                if outcome == "newer":
                    bank.put("cup", state_of(2))
                else:
                    bank.remove("cup")
                bank.prune()
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", remove_then_read)
        if outcome == "newer":
            assert bank.get("cup").tensors["mean"][0] == 2
        else:
            with pytest.raises(InputError) as caught:
                bank.get("cup")
            assert caught.value.code == "class_unknown"
        assert races


def test_verify_ignores_what_is_removed_meanwhile(tmp_path, monkeypatch):
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        for value in (1, 2, 3):
            bank.put("cup", state_of(value))
        read, races = Path.read_bytes, []

        def prune_then_read(path: Path) -> bytes:
            if not races:
                races.append(bank.prune())
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", prune_then_read)
        assert bank.verify() == []
        assert races[0].files == 2


def test_many_may_make_the_same_bank_at_once(tmp_path):
    barrier = threading.Barrier(4)

    def make(_: int) -> None:
        for number in range(15):
            barrier.wait(20)
            with Bank.open(tmp_path / str(number), FINGERPRINT, create=True) as bank:
                bank.put("cup", state_of(1))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(make, range(4)))
    for number in range(15):
        with Bank.open(tmp_path / str(number)) as bank:
            assert [info.version for info in bank.versions("cup")] == [1, 2, 3, 4]


def test_making_a_bank_tries_again_when_sqlite_refuses_without_waiting(tmp_path, monkeypatch):
    """SQLite answers "busy" at once when two processes turn on its log together; here that is made certain."""
    refusals = []

    class Refusing(sqlite3.Connection):
        def execute(self, sql, *values):
            if "journal_mode" in sql and len(refusals) < 3:
                refusals.append(sql)
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            return super().execute(sql, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Refusing, **options))
    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        assert bank.put("cup", state_of(1)) == 1
    assert len(refusals) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_bank_opened_before_a_fork_works_on_both_sides(tmp_path):
    """The parent's last act removes SQLite's log, which a child on the same connection would go on writing to."""
    bank = Bank.open(tmp_path / "bank", FINGERPRINT, create=True)
    bank.put("cup", state_of(1))
    go_on_reading, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.read(go_on_reading, 1)
            bank.put("cup", state_of(3))
            os._exit(0)
        finally:
            os._exit(1)
    bank.put("cup", state_of(2))
    bank.close()
    os.write(go_on, b".")
    assert os.waitpid(child, 0)[1] == 0
    os.close(go_on)
    os.close(go_on_reading)
    with Bank.open(tmp_path / "bank") as again:
        assert [again.get("cup", version).tensors["mean"][0] for version in (1, 2, 3)] == [1, 2, 3]
        assert again.verify() == []


def test_a_failed_write_releases_its_lock(tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with Bank.open(tmp_path / "bank", FINGERPRINT, create=True) as bank:
        with monkeypatch.context() as patched:
            patched.setattr(bank_module, "write_atomic", interrupt)
            with pytest.raises(KeyboardInterrupt):
                bank.put("cup", state_of(1))
        assert bank.names() == []
        other = sqlite3.connect(bank.directory / "index.sqlite", timeout=0, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        other.close()
