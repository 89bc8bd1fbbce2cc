"""Damaged, tampered, unwritable: what is wrong is named, and nothing else breaks."""

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fssdeploy.bank import Bank
from fssdeploy.errors import FssError, InputError, IntegrityError, MachineError

FINGERPRINT = "f" * 64
NOBODY = 65534


def state_file(bank: Bank, name: str, version: int = 1) -> Path:
    return bank.directory / "states" / f"{bank.versions(name)[version - 1].sha256}.safetensors"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "length flipped": lambda path: flip(path, 0),
    "header flipped": lambda path: flip(path, 30),
    "tensor flipped": lambda path: flip(path, -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_others_still_work(bank, make_state, damage):
    for seed in range(2):
        bank.put("cup", make_state(seed))
    bank.put("plate", make_state(5))
    DAMAGES[damage](state_file(bank, "cup", version=2))
    for call in (lambda: bank.get("cup"), lambda: bank.get("cup", 2), lambda: bank.extend("cup", make_state(3))):
        with pytest.raises(IntegrityError) as caught:
            call()
        assert caught.value.code == "state_damaged"
        assert "version 2 of class 'cup'" in caught.value.what
    problems = bank.verify()
    assert len(problems) == 1
    assert "version 2 of class 'cup'" in problems[0]
    assert bank.get("cup", 1).meta == {"seed": 0}
    assert bank.get("plate").meta == {"seed": 5}
    assert bank.put("cup", make_state(1)) == 3  # the same content: mends the file too
    assert bank.verify() == []
    assert bank.get("cup", 2).meta == {"seed": 1}


def test_a_file_that_is_no_state_is_damaged_even_if_its_sha256_is_right(bank, make_state):
    import hashlib

    import safetensors.numpy

    bank.put("cup", make_state())
    data = safetensors.numpy.save({"x": np.zeros(3)})
    sha256 = hashlib.sha256(data).hexdigest()
    (bank.directory / "states" / f"{sha256}.safetensors").write_bytes(data)
    connection = sqlite3.connect(bank.directory / "index.sqlite")
    connection.execute("UPDATE state SET sha256 = ?", (sha256,))
    connection.commit()
    connection.close()
    with pytest.raises(IntegrityError) as caught:
        bank.get("cup")
    assert caught.value.code == "state_damaged"


def use_everything(directory: Path) -> None:
    with Bank.open(directory, FINGERPRINT) as bank:
        for name in bank.names():
            bank.versions(name)
            bank.get(name)
        bank.verify()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is not a database, but long enough to look at" * 100),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:4096]),
        lambda path: path.unlink(),
    ],
    ids=["not a database", "emptied", "truncated", "deleted"],
)
def test_a_damaged_index(bank, make_state, damage):
    for seed in range(20):
        bank.put(f"class {seed}", make_state(seed))
    bank.close()
    damage(bank.directory / "index.sqlite")
    files = sorted((bank.directory / "states").iterdir())
    for create in (False, True):  # above all, no fresh bank whose first pruning deletes every state
        with pytest.raises(IntegrityError) as caught:
            Bank.open(bank.directory, FINGERPRINT, create=create)
        assert caught.value.code == "bank_damaged"
    assert sorted((bank.directory / "states").iterdir()) == files


def test_a_database_of_something_else(tmp_path):
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.execute("CREATE TABLE holidays (day TEXT)")
    connection.commit()
    connection.close()
    for create in (False, True):
        with pytest.raises(IntegrityError) as caught:
            Bank.open(tmp_path, FINGERPRINT, create=create)
        assert caught.value.code == "bank_damaged"


def test_flipped_bytes_in_the_index_give_only_our_errors(bank, make_state, tmp_path):
    for seed in range(12):
        bank.put(f"class {seed % 4}", make_state(seed))
    bank.close()
    index = bank.directory / "index.sqlite"
    whole = index.read_bytes()
    random = np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # empty space in the pages would tell nothing
    noticed = 0
    for offset in random.choice(used, 300, replace=False):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << random.integers(8)
        index.write_bytes(damaged)
        try:
            use_everything(bank.directory)
        except FssError:
            noticed += 1
    assert noticed > 30


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE state SET name = x'63'",
        "UPDATE state SET version = 'two'",
        "UPDATE state SET meta = 'not JSON'",
        "UPDATE bank SET format = 'old'",
        "DELETE FROM bank",
        "DROP TABLE state",
    ],
)
def test_an_index_with_senseless_values(bank, make_state, change):
    bank.put("cup", make_state())
    bank.close()
    connection = sqlite3.connect(bank.directory / "index.sqlite", isolation_level=None)
    connection.execute(change)
    connection.close()
    with pytest.raises(IntegrityError) as caught, Bank.open(bank.directory) as opened:
        opened.names()
        opened.versions("cup")
    assert caught.value.code == "bank_damaged"


def test_verify_looks_at_pages_that_no_listing_reads(bank, make_state):
    for seed in range(40):
        bank.put(f"class {seed}", make_state(seed))
    bank.close()
    path = bank.directory / "index.sqlite"
    connection = sqlite3.connect(path)
    (page,) = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_class_1'"
    ).fetchone()
    connection.close()
    flip(path, 4096 * page - 6)  # in the text of the first entry
    with Bank.open(bank.directory) as opened:
        assert len(opened.names()) == 40
        problems = opened.verify()
    assert len(problems) == 1
    assert "sqlite_autoindex_class_1" in problems[0]


def test_verify_reports_a_damaged_page(bank, make_state):
    for seed in range(40):
        bank.put(f"class {seed}", make_state(seed))
    bank.close()
    index = bank.directory / "index.sqlite"
    data = bytearray(index.read_bytes())
    with Bank.open(bank.directory) as healthy:
        assert healthy.verify() == []
    data[-4096:] = bytes(4096)
    index.write_bytes(data)
    with Bank.open(bank.directory) as opened:
        problems = opened.verify()
    assert problems
    assert all("\n" not in problem for problem in problems)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root's right to write anywhere; what other users may not do, we then may not either."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shelf() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def lock_up(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        path.chmod(0o555 if path.is_dir() else 0o444)


def check_readable_only(directory: Path, make_state) -> None:
    with Bank.open(directory, FINGERPRINT, create=True) as bank:
        assert bank.names() == ["cup"]
        assert bank.get("cup").meta == {"seed": 2}
        assert [info.version for info in bank.versions("cup")] == [1, 2]
        assert bank.verify() == []
        for call in (lambda: bank.put("cup", make_state(3)), lambda: bank.remove("cup"), bank.prune):
            with pytest.raises(MachineError) as caught:
                call()
            assert caught.value.code == "read_only"
        assert bank.verify() == []


def test_a_read_only_bank_can_be_read(shelf, make_state):
    with Bank.open(shelf / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", make_state(1))
        bank.put("cup", make_state(2))
    lock_up(bank.directory)
    with as_nobody():
        check_readable_only(bank.directory, make_state)


def test_a_read_only_bank_that_another_process_has_open_can_be_read(shelf, make_state):
    with Bank.open(shelf / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", make_state(1))
        bank.put("cup", make_state(2))
        shutil.copytree(bank.directory, shelf / "copy")  # its log is not empty, as after a kill
        assert (shelf / "copy" / "index.sqlite-wal").stat().st_size > 0
        lock_up(shelf / "copy")
        with as_nobody():
            check_readable_only(shelf / "copy", make_state)


def test_a_reader_without_permission_to_write_sees_what_is_enrolled_meanwhile(shelf, make_state):
    """The bank of a server that mounts it read-only while somebody enrols elsewhere."""
    Bank.open(shelf / "bank", FINGERPRINT, create=True).close()
    lock_up(shelf / "bank")
    with as_nobody():
        reader = Bank.open(shelf / "bank", FINGERPRINT)
        assert reader.names() == []
    lock = (0o755, 0o644, 0o755) if os.geteuid() != 0 else (0o555, 0o444, 0o555)
    for path, mode in zip((shelf / "bank", shelf / "bank/index.sqlite", shelf / "bank/states"), lock, strict=True):
        path.chmod(mode)
    for version in (1, 2):
        with Bank.open(shelf / "bank", FINGERPRINT) as writer:
            writer.put("cup", make_state(version))
            with as_nobody():
                assert reader.get("cup").meta == {"seed": version}
        with as_nobody():
            assert reader.get("cup").meta == {"seed": version}
    reader.close()


def test_a_log_that_cannot_be_read_is_not_ignored(shelf, make_state):
    with Bank.open(shelf / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", make_state(1))
        shutil.copytree(bank.directory, shelf / "copy")
    (shelf / "copy" / "index.sqlite-shm").unlink()
    lock_up(shelf / "copy")
    with as_nobody(), pytest.raises(MachineError) as caught:
        Bank.open(shelf / "copy", FINGERPRINT)
    assert caught.value.code == "bank_unsettled"
    with Bank.open(shelf / "copy", FINGERPRINT) if os.geteuid() == 0 else bank.open(shelf / "bank") as opened:
        assert opened.names() == ["cup"]


def test_a_bank_that_may_not_be_read_or_made(shelf, make_state):
    with Bank.open(shelf / "bank", FINGERPRINT, create=True) as bank:
        bank.put("cup", make_state())
    shelf.chmod(0o555)
    (shelf / "bank" / "states").chmod(0o755)
    state_file(Bank.open(shelf / "bank"), "cup").chmod(0)
    with as_nobody():
        with Bank.open(shelf / "bank") as opened:
            with pytest.raises(MachineError) as caught:
                opened.get("cup")
            assert caught.value.code == "not_permitted"
            assert len(opened.verify()) == 1
        with pytest.raises(MachineError) as caught:
            Bank.open(shelf / "new", FINGERPRINT, create=True)
        assert caught.value.code == "not_permitted"
    (shelf / "bank" / "index.sqlite").chmod(0)
    with as_nobody(), pytest.raises(MachineError) as caught:
        Bank.open(shelf / "bank")
    assert caught.value.code == "storage"
    (shelf / "bank").chmod(0)
    with as_nobody(), pytest.raises(MachineError) as caught:
        Bank.open(shelf / "bank")
    assert caught.value.code in ("not_permitted", "storage")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [(errno.ENOSPC, "no_space"), (errno.EROFS, "read_only")])
def test_no_space_for_the_file(bank, make_state, monkeypatch, step, failure):
    number, code = failure
    bank.put("cup", make_state(1))
    with monkeypatch.context() as patched:

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        patched.setattr(os, step, refuse)
        for call in (bank.put, bank.extend):
            with pytest.raises(MachineError) as caught:
                call("cup", make_state(2))
            assert caught.value.code == code
    assert [info.version for info in bank.versions("cup")] == [1]
    assert len(list((bank.directory / "states").iterdir())) == 1
    assert bank.put("cup", make_state(2)) == 2
    assert bank.verify() == []


def test_no_space_for_the_index(bank, make_state, monkeypatch):
    connect = sqlite3.connect

    def connect_to_small(*args, **options) -> sqlite3.Connection:
        connection = connect(*args, **options)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_to_small)
    done = 0
    with Bank.open(bank.directory) as full:
        with pytest.raises(MachineError) as caught:
            for done in range(1000):
                full.put("x" * 190 + str(done), make_state())
        assert caught.value.code == "no_space"
        assert len(full.names()) == done
        assert full.verify() == []


def test_a_writer_that_never_ends(bank, make_state, monkeypatch):
    monkeypatch.setattr("fssdeploy.bank.index.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(bank.directory / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Bank.open(bank.directory) as opened:
        with pytest.raises(MachineError) as caught:
            opened.put("cup", make_state())
        assert caught.value.code == "bank_busy"
        other.execute("ROLLBACK")
        other.close()
        assert opened.put("cup", make_state()) == 1


def test_without_its_states_folder(bank, make_state):
    bank.put("cup", make_state())
    shutil.rmtree(bank.directory / "states")
    with pytest.raises(IntegrityError):
        bank.get("cup")
    for call in (lambda: bank.put("cup", make_state()), bank.prune):
        with pytest.raises(MachineError) as caught:
            call()
        assert caught.value.code == "folder_missing"
    with pytest.raises(InputError):
        bank.get("cup", 2)
